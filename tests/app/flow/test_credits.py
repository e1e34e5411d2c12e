"""What the allocator promises of ingresses and a Model over an unreliable network."""

import math
import pickle
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.config.queue import QueueSettings
from app.contracts.credits import Gathers, Grant
from app.core.tiers import PriorityMode, Tier
from app.flow.allocation.allocator import LOOK_AFTER_S, Capacity, CreditAllocator
from app.flow.credits import QUIET_S, RENEWAL_S, SILENCE_S, Credits
from app.flow.slots import Offer

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
NOTHING = dict.fromkeys(Tier, 0)
LATER = 2 * SILENCE_S


def book_of(slots, *, life="model", now=0.0, headroom=0.1):
    allocator = CreditAllocator(life, QueueSettings(headroom=headroom), now)
    allocator.set_replicas([Capacity(name, "pool", n, True) for name, n in slots.items()])
    return allocator


def ingress(name, slots=()):
    credits = Credits(name)
    offers = [Offer(replica, "pool", 8, frozenset({"chat"})) for replica in slots]
    credits.set_replicas(offers, PriorityMode.AUTO)
    return credits


def demand(of, now, waiting=NOTHING, oldest_s=0.0, starving=0):
    ages = {tier: oldest_s if waiting[tier] else 0.0 for tier in Tier}
    return of.demand(now, waiting=waiting, oldest_s=ages, starving=starving)


def renew(of, allocator, now, waiting=NOTHING, **more):
    grant = allocator.renew(demand(of, now, waiting, **more), now)
    of.receive(grant, now)
    return grant


def held(of):
    return {replica: credit for replica, (credit, _) in of.slot_table.held().items() if credit}


def occupy(of, replica_id, tier=D, times=1):
    for _ in range(times):
        of.occupy(of.slot_table[replica_id], tier)


def settle_down(allocator, *ingresses, now=LATER, waiting=NOTHING, seconds=4.0):
    """Let everyone renew for a while, as they do in peace."""
    steps = int(seconds / RENEWAL_S)
    for step in range(steps):
        for one in ingresses:
            renew(one, allocator, now + step * RENEWAL_S, waiting)
    return now + steps * RENEWAL_S


def test_one_ingress_holds_all_credits():
    slots = {"a": 4, "b": 8}
    allocator, one = book_of(slots), ingress("one", slots)
    renew(one, allocator, LATER)
    assert held(one) == slots
    assert one.slot_table.headroom == 2


def test_a_restarted_model_gives_nothing_away_before_it_has_listened():
    slots = {"a": 8}
    allocator, one, two = book_of(slots), ingress("one", slots), ingress("two", slots)
    renew(one, allocator, LATER)
    assert held(one) == {"a": 8}
    later = LATER + SILENCE_S - RENEWAL_S
    allocator = book_of(slots, life="next", now=later)
    for step in range(int(SILENCE_S / RENEWAL_S)):
        renew(two, allocator, later + step * RENEWAL_S)
        renew(one, allocator, later + step * RENEWAL_S)
        assert (held(one), held(two)) == ({"a": 8}, {})
    settle_down(allocator, two, one, now=later + SILENCE_S)
    # Eight slots, and one more so that each has one for priority.
    assert sorted(sum(held(each).values()) for each in (one, two)) == [4, 5]


def test_a_slot_is_moved_only_once_it_is_reported_free():
    slots = {"a": 4}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    renew(one, allocator, LATER)
    occupy(one, "a", D, times=4)
    waiting = NOTHING | {P: 2}
    now = LATER
    for _ in range(8):
        now += RENEWAL_S
        renew(two, allocator, now, waiting)
        renew(one, allocator, now)
        assert held(two) == {}
    one.release("a", D)
    assert held(one) == {"a": 3}
    renew(two, allocator, now, waiting)
    assert held(two) == {}
    renew(one, allocator, now)
    renew(two, allocator, now, waiting)
    assert held(two) == {"a": 1}


def test_priority_at_one_ingress_makes_another_give_up_idle_slots_within_one_renewal():
    slots = {"a": 8}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)
    before = held(two)["a"]
    renew(two, allocator, now, NOTHING | {P: 20})
    renew(one, allocator, now)
    assert one.renewal_at(waits=False, priority_waits=False) == now
    renew(one, allocator, now)
    assert allocator.wakeups(now) == ["two"]
    renew(two, allocator, now, NOTHING | {P: 20})
    assert held(two)["a"] > before
    assert sum(held(one).values()) + held(two)["a"] == 8


def test_an_ingress_with_nothing_to_say_is_told_what_others_want_of_it():
    slots = {"a": 8}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)
    renew(one, allocator, now)
    renew(two, allocator, now, NOTHING | {D: 6}, oldest_s=1.0)
    assert allocator.wakeups(now) == [], "it comes by itself, if it has anything to say"
    now += LOOK_AFTER_S
    renew(two, allocator, now, NOTHING | {D: 6}, oldest_s=1.25)
    assert allocator.wakeups(now) == ["one"]
    assert allocator.wakeups(now) == [], "once is enough"
    renew(one, allocator, now)
    renew(one, allocator, now)
    now += LOOK_AFTER_S
    assert allocator.wakeups(now) == ["two"], "there is room for it now"


def test_an_ingress_with_nothing_to_say_is_told_how_many_share_the_model():
    slots = {"a": 8}
    allocator, one, two = book_of(slots), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one)
    now += LOOK_AFTER_S
    assert allocator.wakeups(now) == []
    renew(two, allocator, now)
    assert allocator.wakeups(now) == ["one"]
    renew(one, allocator, now)
    assert one.ingresses == 2


def test_nobody_is_nudged_in_peace_or_for_what_it_has_been_told():
    slots = {"a": 8}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)
    assert allocator.wakeups(now + QUIET_S) == []
    for each in (one, two):
        occupy(each, "a", D, times=held(each)["a"])
    for _ in range(2):
        renew(two, allocator, now, NOTHING | {D: 12}, oldest_s=5.0)
        grant = renew(one, allocator, now)
    assert held(one)["a"] > grant.at_most["pool"], "it gives up credits as their slots come free"
    renew(two, allocator, now + LOOK_AFTER_S, NOTHING | {D: 12}, oldest_s=5.0)
    assert allocator.wakeups(now + LOOK_AFTER_S) == []


def kept_and_anew(allocator, *names):
    """Return terms as they are kept, and computed anew: of these pools, or where any are kept."""
    # private: terms that are out of date show only in some later grant, if at all.
    kept, pools, terms = allocator._cached_terms, allocator._pools, allocator._terms  # noqa: SLF001
    before = {name: terms(name, pools[name]) for name in names or list(kept)}
    kept.clear()
    return before, {name: terms(name, pools[name]) for name in before}


def test_terms_are_computed_again_whenever_their_inputs_change():
    slots = {"a": 8, "b": 4}
    allocator, one, two = book_of(slots), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)

    def check():
        kept, anew = kept_and_anew(allocator, "pool")
        assert kept == anew
        again, _ = kept_and_anew(allocator, "pool")
        assert again["pool"] is anew["pool"], "they are kept"

    check()
    renew(one, allocator, now, NOTHING | {D: 9}, oldest_s=3.0)
    check()
    renew(ingress("three", slots), allocator, now)
    check()
    allocator.set_replicas(
        [Capacity(name, "pool", n, True) for name, n in {"a": 8, "c": 2}.items()]
    )
    check()
    allocator.configure(QueueSettings(headroom=0.5, starvation_every=3))
    check()
    renew(one, allocator, now + SILENCE_S)
    check()


def test_a_silent_ingress_gives_its_credits_back():
    slots = {"a": 8}
    allocator, one, two = book_of(slots), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)
    settle_down(allocator, two, now=now + SILENCE_S)
    assert held(two) == {"a": 8}
    # The silent one has closed its own in the meantime, and on return holds what it is given.
    one.advance(now + SILENCE_S)
    assert one.slot_table.find(P, "chat") is None
    later = now + 3 * SILENCE_S
    renew(two, allocator, later)
    renew(one, allocator, later)
    assert held(one) == {"a": 1}, "the floor"
    settle_down(allocator, one, two, now=later)
    assert held(one)["a"] + held(two)["a"] == 9 and held(one)["a"] >= 3


def test_requests_of_an_ingress_that_returns_count_until_they_end():
    slots = {"a": 4}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    renew(one, allocator, LATER)
    occupy(one, "a", D, times=3)
    later = settle_down(allocator, two, now=LATER + SILENCE_S)
    assert held(two) == {"a": 4}
    renew(one, allocator, later)
    now = settle_down(allocator, one, two, now=later, seconds=2.0)
    assert one.slot_table["a"].running == 3 and one.slot_table["a"].credit == 0
    assert held(two)["a"] <= 2, "its share; the other's three still run"
    for _ in range(3):
        one.release("a", D)
    settle_down(allocator, one, two, now=now)
    assert (held(one)["a"], held(two)["a"]) == (2, 2)


def test_a_grant_is_repeated_until_it_is_acknowledged_and_applied_once():
    slots = {"a": 8}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    first = allocator.renew(demand(one, LATER), LATER)
    second = allocator.renew(demand(one, LATER + 1), LATER + 1)
    assert (second.number, second.added) == (first.number, {"a": 8})
    renew(two, allocator, LATER + 1, NOTHING | {P: 5})
    assert held(two) == {}
    for grant in (second, first, second):
        one.receive(grant, LATER + 1)
        assert held(one) == {"a": 8}


def test_a_grant_that_may_still_arrive_counts():
    slots = {"a": 8, "b": 8}
    allocator, one, two = book_of({"a": 8}), ingress("one", slots), ingress("two", slots)
    settle_down(allocator, one, seconds=1.0)
    allocator.set_replicas([Capacity(name, "pool", 8, True) for name in slots])
    grant = allocator.renew(demand(one, LATER + 1), LATER + 1)
    assert grant.added == {"b": 8}
    for _ in range(3):
        allocator.renew(demand(one, LATER + 1), LATER + 1)
        renew(two, allocator, LATER + 1, NOTHING | {P: 5})
        assert sum(held(two).values()) <= 1, "the floor"
    one.receive(grant, LATER + 1)
    assert held(one) == {"a": 8, "b": 8}


def test_a_late_demand_is_not_believed():
    slots = {"a": 8}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    late = demand(one, LATER)
    renew(one, allocator, LATER)
    renew(one, allocator, LATER)
    allocator.renew(late, LATER)
    renew(two, allocator, LATER, NOTHING | {P: 5})
    assert held(two) == {}


def test_a_restarted_model_waits_for_everyone_it_hears_to_acknowledge():
    slots = {"a": 8}
    old, one, two = book_of(slots), ingress("one", slots), ingress("two", slots)
    renew(one, old, LATER)
    new = book_of(slots, life="new", now=LATER)
    asked = demand(one, LATER)
    # A last grant of the old Model is still under way to the one that speaks to the new.
    for step in range(24):
        now = LATER + step * RENEWAL_S
        new.renew(demand(one, now), now)
        renew(two, new, now, NOTHING | {P: 5})
        assert held(two) == {}
    assert asked.life == "model"
    settle_down(new, one, two, now=now, waiting=NOTHING | {P: 1})
    assert held(two) != {}


def test_credits_are_given_to_others_only_after_the_full_silence():
    slots = {"a": 8}
    allocator, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    renew(one, allocator, LATER)
    for now in (LATER, LATER + SILENCE_S - 0.01):
        renew(two, allocator, now, NOTHING | {P: 5})
        assert held(two) == {}
    renew(two, allocator, LATER + SILENCE_S, NOTHING | {P: 5})
    assert held(two) == {"a": 8}


def test_credits_last_from_when_they_were_asked_for():
    slots = {"a": 8}
    allocator, one = book_of(slots), ingress("one", slots)
    grant = allocator.renew(demand(one, LATER), LATER)
    one.receive(grant, LATER + SILENCE_S - 0.5)
    assert one.slot_table.find(P, "chat") is not None
    one.advance(LATER + SILENCE_S)
    assert one.slot_table.find(P, "chat") is None


def test_a_returning_ingress_is_not_confused_by_a_grant_from_before():
    slots = {"a": 4, "b": 4}
    allocator, one, two = book_of({"a": 4}), ingress("one", slots), ingress("two", slots)
    renew(one, allocator, LATER)
    allocator.set_replicas([Capacity(name, "pool", 4, True) for name in slots])
    before = allocator.renew(demand(one, LATER), LATER)
    assert before.added == {"b": 4}
    later = settle_down(allocator, two, now=LATER + SILENCE_S)
    after = allocator.renew(demand(one, later), later)
    for grant in (before, after, before):
        one.receive(grant, later)
    assert held(one) == dict(after.added)


def test_a_late_grant_of_a_former_model_is_ignored():
    slots = {"a": 8}
    old, one = book_of(slots), ingress("one", slots)
    renew(one, old, LATER)
    late = old.renew(demand(one, LATER + 1), LATER + 1)
    new = book_of(slots, life="new", now=LATER + 2)
    renew(one, new, LATER + 2)
    before = held(one)
    one.receive(late, LATER + 2)
    one.receive(Grant("old", 99, late.answers, LATER, added={"a": 5}), LATER + 2)
    assert held(one) == before


def test_credits_that_a_former_model_gave_away_do_not_come_back_with_the_next():
    slots = {"a": 4, "b": 4}
    old, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    now = settle_down(old, one, two)
    assert held(one) and held(two)
    now += SILENCE_S
    renew(one, old, now)
    assert held(one) == slots, "the other was silent"
    new = book_of(slots, life="new", now=now, headroom=0)
    for each in (one, two):
        renew(each, new, now + RENEWAL_S)
    assert (held(one), held(two)) == (slots, {})
    assert two.slot_table.find(P, "chat") is None
    settle_down(new, one, two, now=now + RENEWAL_S)
    assert held(one) and held(two)
    assert sum(held(one).values()) + sum(held(two).values()) == 8


def test_a_demand_that_the_next_model_gets_late_does_not_bring_them_back_either():
    slots = {"a": 2}
    old, one, two = book_of(slots, headroom=0), ingress("one", slots), ingress("two", slots)
    renew(one, old, LATER)
    sent = LATER + SILENCE_S - 0.1
    late = demand(one, sent)
    renew(two, old, LATER + SILENCE_S)
    assert held(two) == slots
    new = book_of(slots, life="new", now=LATER + SILENCE_S, headroom=0)
    one.receive(new.renew(late, LATER + SILENCE_S), LATER + SILENCE_S)
    assert held(one) == {}


def test_open_credits_outlast_a_restart_and_what_runs_on_closed_ones_counts():
    slots = {"a": 4}
    old, one = book_of(slots, headroom=0), ingress("one", slots)
    renew(one, old, LATER)
    occupy(one, "a", D, times=2)
    new = book_of(slots, life="new", now=LATER, headroom=0)
    last = LATER + SILENCE_S - 0.1
    renew(one, new, last)
    assert held(one) == slots, "no Model has waited long enough to give them away"
    closed = last + SILENCE_S
    newest, two = book_of(slots, life="newest", now=closed, headroom=0), ingress("two", slots)
    renew(one, newest, closed)
    assert held(one) == {} and one.slot_table["a"].running == 2
    for step in range(20):
        now = closed + step * RENEWAL_S
        renew(one, newest, now)
        renew(two, newest, now, NOTHING | {P: 9})
    assert held(two) == {"a": 2}


def test_a_replica_that_comes_is_shared_and_one_that_goes_is_dropped():
    slots = {"a": 4, "b": 4}
    allocator, one, two = book_of({"a": 4}), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)
    allocator.set_replicas([Capacity(name, "pool", 4, True) for name in slots])
    now = settle_down(allocator, one, two, now=now)
    assert sum(held(one).values()) + sum(held(two).values()) == 8 + 1
    assert min(sum(held(each).values()) for each in (one, two)) >= 4
    allocator.set_replicas([Capacity("b", "pool", 4, True)])
    for each in (one, two):
        each.set_replicas([Offer("b", "pool", 4, frozenset({"chat"}))], PriorityMode.AUTO)
    settle_down(allocator, one, two, now=now)
    assert held(one).keys() | held(two).keys() == {"b"}


def test_each_pool_is_shared_by_itself():
    allocator = CreditAllocator("model", QueueSettings(), 0.0)
    native = [Capacity(f"n{i}", "native", 8, True) for i in range(2)]
    allocator.set_replicas([*native, Capacity("p", "plain", 8, False)])
    offers = [
        Offer(c.replica_id, c.pool, 8, frozenset({"chat"} if c.honours else ())) for c in native
    ]
    offers.append(Offer("p", "plain", 8, frozenset()))
    both = [ingress("one"), ingress("two")]
    for one in both:
        one.set_replicas(offers, PriorityMode.AUTO)
    settle_down(allocator, *both)
    for pool, slots in (("native", 16), ("plain", 8)):
        held = [one.slot_table.credits_in(pool) for one in both]
        assert sum(held) == slots and max(held) - min(held) <= slots // 4
    assert [one.slot_table.headroom for one in both] == [1, 1]


def test_ingresses_with_the_same_load_do_not_pass_slots_to_and_fro():
    slots = {"a": 40}
    allocator, one, two = book_of(slots), ingress("one", slots), ingress("two", slots)
    now = settle_down(allocator, one, two)
    for each in (one, two):
        occupy(each, "a", D, times=held(each)["a"])
    before = held(one), held(two)
    for step in range(40):
        now += RENEWAL_S
        renew(one, allocator, now, NOTHING | {D: 30 + step % 5}, oldest_s=5.0)
        renew(two, allocator, now, NOTHING | {D: 34 - step % 5}, oldest_s=5.2)
    assert (held(one), held(two)) == before


def test_the_demand_and_the_grant_are_small():
    slots = {f"replica-{i:04}": 8 for i in range(250)}
    allocator, one = book_of(slots), ingress("one", slots)
    message = demand(one, LATER)
    grant = allocator.renew(message, LATER)
    assert pickle.loads(pickle.dumps(grant)) == grant
    one.receive(grant, LATER)
    message = demand(one, LATER + 1)
    assert pickle.loads(pickle.dumps(message)) == message
    assert len(pickle.dumps(message)) < 10_000
    assert len(pickle.dumps(allocator.renew(message, LATER + 1))) < 1_000


class Request:
    """A request that runs; ``overhang`` once its ingress has been silent meanwhile."""

    def __init__(self, owner, replica_id, tier):
        self.owner, self.replica_id, self.tier = owner, replica_id, tier
        self.overhang = False


class CreditMachine(RuleBasedStateMachine):
    """Ingresses and Models that start and die, and messages that are lost, late and doubled."""

    @initialize(headroom=st.sampled_from([0.0, 0.2]), preempts=st.booleans(), data=st.data())
    def begin(self, headroom, preempts, data):
        self.preempts = preempts
        self.now = 100.0
        self.headroom = headroom
        self.names = count()
        self.slots, self.slots_ever = {}, {}
        self.seen_by_model = {}
        self.ingresses, self.named, self.sent_at = {}, {}, {}
        self.demands, self.grants = [], []
        self.requests = []
        self.floors = {}
        self.allocator: Any = None
        self.down_since = self.now
        self.restart_model()
        for _ in range(2):
            self.start_ingress()
            self.add_replica(data.draw(st.integers(1, 6)))
        self.now += data.draw(st.sampled_from([0.0, 10.0]))

    # Ingresses.

    @rule()
    def start_ingress(self):
        if len(self.ingresses) < 4:
            name = f"i{next(self.names)}"
            one = Credits(name)
            self.ingresses[one], self.named[one], self.sent_at[one] = [], name, -math.inf
            self.look(one)

    def look(self, one):
        offers = [
            Offer(r, "pool", n, frozenset({"chat"}), preempts=self.preempts)
            for r, n in self.seen_by_model.items()
        ]
        one.set_replicas(offers, PriorityMode.AUTO)

    @precondition(lambda self: self.ingresses)
    @rule(data=st.data())
    def ingress_sees_replicas(self, data):
        self.look(self.one_of(data))

    @precondition(lambda self: len(self.ingresses) > 1)
    @rule(data=st.data())
    def ingress_crashes(self, data):
        one = self.one_of(data)
        del self.ingresses[one]
        self.requests = [request for request in self.requests if request.owner is not one]

    @precondition(lambda self: self.ingresses)
    @rule(data=st.data(), tier=st.sampled_from([P, P, D, F]), times=st.integers(1, 6))
    def places(self, data, tier, times):
        one = self.one_of(data)
        one.advance(self.now)
        for _ in range(times):
            if (place := one.slot_table.find(tier, "chat")) is not None:
                one.occupy(place, tier)
                self.requests.append(Request(one, place.replica_id, tier))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), times=st.integers(1, 3))
    def finishes(self, data, times):
        for _ in range(min(times, len(self.requests))):
            request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
            request.owner.release(request.replica_id, request.tier)

    # Messages.

    def ask(self, one, *more):
        self.sent_at[one] = self.now
        return demand(one, self.now, *more)

    @precondition(lambda self: self.ingresses)
    @rule(
        data=st.data(),
        waiting=st.tuples(*[st.integers(0, 5)] * 3),
        arrives=st.sampled_from([True, True, False]),
        returns=st.sampled_from([True, True, False]),
    )
    def sends(self, data, waiting, arrives, returns):
        one = self.one_of(data)
        asked = self.ask(one, dict(zip(Tier, waiting, strict=True)), 1.0)
        if self.slots and data.draw(st.sampled_from([False, False, True])):
            replica_id = data.draw(st.sampled_from(sorted(self.slots)))
            slots = data.draw(st.integers(2, 6))
            tier, alone = data.draw(st.sampled_from(Tier)), data.draw(st.booleans())
            asked = replace(asked, gathers=Gathers(replica_id, slots, tier, alone))
        self.ingresses[one].append(asked)
        self.demands.append((one, asked))
        if arrives and self.allocator is not None:
            self.model_gets(one, asked)
            if returns:
                self.ingress_gets(*self.grants[-1])

    @precondition(lambda self: self.demands and self.allocator is not None)
    @rule(data=st.data())
    def demand_arrives(self, data):
        self.model_gets(*data.draw(st.sampled_from(self.demands[-12:])))

    def model_gets(self, one, asked):
        self.grants.append((one, self.allocator.renew(asked, self.now)))
        for pool in self.pools():
            for replica_id in pool.replicas:
                self.floors[replica_id] = max(self.floors.get(replica_id, 0), pool.floor)

    def pools(self):
        # private: no message carries the floor, of which the bound is made.
        return self.allocator._pools.values()  # noqa: SLF001

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def grant_arrives(self, data):
        full = [grant for grant in self.grants if grant[1].added]
        self.ingress_gets(*data.draw(st.sampled_from(self.grants[-6:] + full[-6:])))

    def ingress_gets(self, one, grant):
        if one in self.ingresses:
            one.receive(grant, self.now)

    @precondition(lambda self: self.ingresses)
    @rule(data=st.data())
    def renewal_fails(self, data):
        one = self.one_of(data)
        # Only what was sent while the Model was down: see Credits.renewal_failed.
        sent = [d for d in self.ingresses[one] if self.down_since <= d.sent_at <= self.down_until]
        if sent:
            one.renewal_failed(sent[-1], self.now)

    # The Model.

    @precondition(lambda self: self.allocator is not None)
    @rule()
    def model_dies(self):
        self.allocator, self.down_since, self.down_until = None, self.now, math.inf

    @precondition(lambda self: self.allocator is None)
    @rule()
    def restart_model(self):
        self.down_until = self.now
        self.allocator = CreditAllocator(
            f"m{next(self.names)}", QueueSettings(headroom=self.headroom), self.now
        )
        self.model_sees_replicas()

    @precondition(lambda self: self.allocator is not None)
    @rule()
    def model_is_replaced(self):
        self.model_dies()
        self.restart_model()

    def model_sees_replicas(self):
        self.seen_by_model = dict(self.slots)
        if self.allocator is not None:
            self.allocator.set_replicas(
                Capacity(r, "pool", n, True, self.preempts) for r, n in self.slots.items()
            )

    @rule(headroom=st.sampled_from([0.0, 0.2, 0.5]))
    def settings_change(self, headroom):
        self.headroom = headroom
        if self.allocator is not None:
            self.allocator.configure(QueueSettings(headroom=headroom))

    @rule(slots=st.integers(1, 6))
    def add_replica(self, slots):
        if len(self.slots) < 4:
            replica_id = f"r{next(self.names)}"
            self.slots[replica_id] = self.slots_ever[replica_id] = slots
            self.model_sees_replicas()

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), back=st.booleans())
    def lose_replica(self, data, back):
        replica_id = data.draw(st.sampled_from(sorted(self.slots)))
        slots = self.slots.pop(replica_id)
        self.model_sees_replicas()
        if back:
            self.slots[replica_id] = slots
            self.model_sees_replicas()

    @rule(seconds=st.sampled_from([0.1, 0.25, 1.0, 1.5, 3.0]))
    def time_passes(self, seconds):
        self.now += seconds
        for request in self.requests:
            request.overhang |= not request.owner.in_force(self.now)

    @rule(rounds=st.integers(1, 14), waiting=st.tuples(*[st.integers(0, 5)] * 3))
    def peace(self, rounds, waiting):
        """All renew as they should, so that the machine does not only test emergencies."""
        self.renew_all(self.ingresses, rounds, waiting)

    @precondition(lambda self: len(self.ingresses) > 1 and self.allocator is not None)
    @rule(data=st.data(), rounds=st.integers(8, 16), waiting=st.tuples(*[st.integers(0, 5)] * 3))
    def one_is_silent(self, data, rounds, waiting):
        """All others renew as they should, so long that its credits may be given to them."""
        silent = self.one_of(data)
        self.renew_all([one for one in self.ingresses if one is not silent], rounds, waiting)

    def renew_all(self, ingresses, rounds, waiting):
        for _ in range(rounds):
            self.time_passes(RENEWAL_S)
            if self.allocator is None:
                return
            for one in ingresses:
                asked = self.ask(one, dict(zip(Tier, waiting, strict=True)), 1.0)
                self.model_gets(one, asked)
                self.ingress_gets(*self.grants[-1])

    @rule(seconds=st.sampled_from([1.0, 2.0, 4.0]))
    def nobody_asks(self, seconds):
        """All renew when it is due by their own account, and when they are woken."""
        until = self.now + seconds
        while self.allocator is not None and self.now < until:
            self.time_passes(RENEWAL_S)
            woken = self.allocator.wakeups(self.now)
            for one in self.ingresses:
                due = one.renewal_at(waits=False, priority_waits=False)
                if self.named[one] in woken or due <= self.now:
                    self.model_gets(one, self.ask(one))
                    self.ingress_gets(*self.grants[-1])

    def one_of(self, data):
        return data.draw(st.sampled_from(list(self.ingresses)))

    @invariant()
    def usable_credits_never_exceed_the_slots_plus_the_floor(self):
        if not hasattr(self, "ingresses"):
            return
        usable = {}
        for one in self.ingresses:
            if one.in_force(self.now):
                for replica_id, credit in held(one).items():
                    usable[replica_id] = usable.get(replica_id, 0) + credit
        for replica_id, credits in usable.items():
            # A replica that is gone keeps its slots here.
            assert credits <= self.most(replica_id), (replica_id, usable)

    @invariant()
    def an_ingress_renews_well_before_it_is_taken_for_silent(self):
        for one in getattr(self, "ingresses", ()):
            due = one.renewal_at(waits=False, priority_waits=False)
            assert due <= self.sent_at[one] + SILENCE_S / 3

    @invariant()
    def terms_are_up_to_date(self):
        allocator = getattr(self, "allocator", None)
        if allocator is not None:
            kept, anew = kept_and_anew(allocator)
            assert kept == anew

    @invariant()
    def requests_never_exceed_that_but_for_those_of_the_silent(self):
        if not hasattr(self, "ingresses"):
            return
        for replica_id in {request.replica_id for request in self.requests}:
            running = [r for r in self.requests if r.replica_id == replica_id and not r.overhang]
            if self.preempts:
                # Flex runs on what default may take back, and priority up to its limits.
                running = [request for request in running if request.tier is D]
            assert len(running) <= self.most(replica_id)

    def most(self, replica_id):
        return self.slots_ever[replica_id] + self.floors.get(replica_id, 0)

    @invariant()
    def the_floor_is_no_more_than_one_slot_for_each_ingress(self):
        if not hasattr(self, "ingresses") or self.allocator is None:
            return
        # private: to ask whom the Model counts, by `demands`, would forget the silent.
        heard = len(self.allocator._accounts)  # noqa: SLF001
        for pool in self.pools():
            assert pool.floor == (
                max(0, math.ceil((heard - pool.headroom) / len(pool.replicas)))
                if pool.headroom
                else 0
            )

    def teardown(self):
        """When peace returns all slots are handed out again: no credit is ever lost."""
        if not hasattr(self, "ingresses") or not self.slots:
            return
        if self.allocator is None:
            self.restart_model()
        if not self.ingresses:
            self.start_ingress()
        for request in self.requests:
            request.owner.release(request.replica_id, request.tier)
        self.requests.clear()
        for one in self.ingresses:
            self.look(one)
        self.nobody_asks(20.0)
        (pool,) = self.pools()
        total = sum(sum(held(one).values()) for one in self.ingresses)
        floor = max(0, len(self.ingresses) - pool.headroom) if pool.headroom else 0
        assert total >= sum(self.slots.values()) + floor


class Draws:
    """Stands in for ``st.data()`` where a counterexample is played again."""

    def __init__(self, *values):
        self._values = list(values)

    def draw(self, _strategy):
        return self._values.pop(0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_that_dies_after_it_gave_credits_away_costs_no_slot_twice(which):
    """What the machine once found: two ingresses could use the same slot."""
    machine = CreditMachine()
    machine.begin(headroom=0.0, preempts=False, data=Draws(1, 1, 0.0))
    one = list(machine.ingresses)[which]

    def sends():
        machine.sends(arrives=True, returns=True, waiting=(0, 0, 0), data=Draws(one, False))

    def peace(rounds):
        machine.peace(rounds=rounds, waiting=(0, 0, 0))

    steps = [
        lambda: peace(11),
        sends,
        lambda: peace(1),
        lambda: machine.time_passes(seconds=3.0),
        sends,
        machine.model_dies,
        machine.restart_model,
        lambda: peace(1),
    ]
    for step in steps:
        step()
        machine.usable_credits_never_exceed_the_slots_plus_the_floor()
    machine.teardown()


TestCreditMachine = CreditMachine.TestCase
TestCreditMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_slots_taken_beyond_the_credits_of_a_replica_that_preempts_are_counted():
    one = Credits("one")
    one.set_replicas([Offer("a", "pool", 2, frozenset({"chat"}), preempts=True)], PriorityMode.AUTO)
    one.slot_table.add_credits("a", 2)
    occupy(one, "a", F, times=2)
    assert one.preemptions == {}
    occupy(one, "a", P, times=2)
    assert (one.preemptions, one.running) == ({P: 2}, {P: 2, D: 0, F: 2})
    one.release("a", F)
    one.release("a", F)
    one.release("a", P)
    occupy(one, "a", D)
    assert one.preemptions == {P: 2}
