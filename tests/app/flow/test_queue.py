import math
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.config.queue import QueueSettings
from app.core.settings import SettingsError
from app.core.tiers import Tier
from app.flow.queue import GrantRate, RequestQueue
from app.flow.request import QueuedRequest

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX


def queue(**values):
    made = RequestQueue(QueueSettings.load(values, "queue"))
    made.configure(made.settings, slots=0, ingresses=1)
    return made


def bounded(priority, default, flex):
    wanted = {"priority": priority, "default": default, "flex": flex}
    return queue(**{tier: {"max_waiting": most, "reserved": 0} for tier, most in wanted.items()})


def join(to, tier=D, tenant="a", tokens=1, now=0.0, **more):
    request = QueuedRequest(tier, tenant, tokens, **more)
    return request, to.join(request, now)


def anywhere(request):
    return True


def take(of, now=0.0):
    return of.take(anywhere, anywhere, now)


def drain(of, now=0.0):
    return list(iter(lambda: take(of, now), None))


def test_order_is_tier_then_tenant_then_arrival():
    it = queue()
    flex, first, second, other, priority = (
        join(it, tier, tenant, tokens=10)[0]
        for tier, tenant in [(F, "a"), (D, "a"), (D, "a"), (D, "b"), (P, "z")]
    )
    assert drain(it) == [priority, first, other, second, flex]


def test_a_tenant_that_comes_back_is_lifted_to_the_least_counter_among_the_waiting():
    it = queue()
    join(it, tenant="saver", tokens=1)
    take(it)
    for _ in range(10):
        join(it, tenant="busy", tokens=100)
    for _ in range(5):
        take(it)
    # Its idle time bought it nothing: it takes turns with the busy one from now on.
    for _ in range(3):
        join(it, tenant="saver", tokens=100)
    assert [request.tenant for request in drain(it)][:4] in (
        ["busy", "saver", "busy", "saver"],
        ["saver", "busy", "saver", "busy"],
    )


def test_what_was_used_while_nobody_waited_is_not_held_against_a_tenant():
    it = queue()
    for _ in range(50):
        it.granted(QueuedRequest(D, "early", 1000), 0.0)
    for tenant in ["early", "late"] * 4:
        join(it, tenant=tenant, tokens=1000)
    tenants = [request.tenant for request in drain(it)]
    assert tenants[:4].count("early") >= 1


def test_a_wrong_estimate_is_put_right():
    it = queue()
    modest, greedy = QueuedRequest(D, "modest", 10), QueuedRequest(D, "greedy", 10)
    for request in (modest, greedy):
        it.granted(request, 0.0)
    for tenant in ["greedy", "modest"] * 2:
        join(it, tenant=tenant, tokens=10)
    it.settle(greedy, 1000)
    assert [request.tenant for request in drain(it)] == ["modest", "modest", "greedy", "greedy"]


def test_the_newest_of_the_lowest_tier_is_displaced():
    it = bounded(4, 4, 4)
    *_, newest_flex, _ = [join(it, tier)[0] for tier in (F, D, F, D)]
    assert join(it, P)[1] is newest_flex
    newest_default, out = join(it, D)
    assert out.tier is F
    assert join(it, P)[1] is newest_default
    request, out = join(it, F)
    assert out is request
    assert (it.waiting(P), it.waiting(D), it.waiting(F)) == (2, 2, 0)


def test_a_line_that_fills_up_refuses_flex_first_and_keeps_room_for_priority():
    it = bounded(3, 2, 1)
    assert join(it, D)[1] is None
    flex, out = join(it, F)
    assert out is flex
    assert join(it, D)[1] is None
    default, out = join(it, D)
    assert out is default
    assert join(it, P)[1] is None
    assert join(it, P)[1].tier is D


def test_a_few_of_each_tier_stay_however_full_the_line_is():
    places = {"max_waiting": 3, "reserved": 2}
    it = queue(priority=places, default=places, flex=places)
    flex = [join(it, F) for _ in range(4)]
    assert [out is request for request, out in flex] == [False, False, False, True]
    assert join(it, P)[1] is flex[2][0]
    assert [join(it, D)[1] for _ in range(2)] == [None, None]
    late, out = join(it, D)
    assert out is late
    assert join(it, P)[1] is None
    late, out = join(it, P)
    assert out is late
    assert (it.waiting(P), it.waiting(D), it.waiting(F)) == (2, 2, 2)


def test_an_admitted_request_that_is_replayed_gets_into_a_full_line_and_is_not_displaced():
    it = bounded(1, 1, 1)
    join(it, F)
    replay, out = join(it, F, replayed=True)
    assert out is None
    assert join(it, D)[1].replayed is False
    request, out = join(it, P)
    assert out.tier is D
    request, out = join(it, D)
    assert out is request
    assert replay in drain(it)


def test_a_replay_comes_before_its_tenants_other_requests_and_costs_nothing_more():
    it = queue()
    first = QueuedRequest(D, "a", 50)
    it.granted(first, 0.0)
    join(it, tenant="a", tokens=50)
    first.replayed = True
    it.join(first, 1.0)
    # Level with "a" before the replay, and behind it by arrival.
    join(it, tenant="b", tokens=50)
    assert take(it) is first
    assert [request.tenant for request in drain(it)] == ["a", "b"]


def test_requests_that_have_waited_too_long_leave_in_the_order_of_their_arrival():
    it = queue(default={"max_wait_s": 10}, flex={"max_wait_s": 20})
    first, _ = join(it, D, now=0)
    second, _ = join(it, D, now=1)
    flex, _ = join(it, F, now=0)
    assert it.next_expiry() == 10
    assert list(it.expire(9.99)) == []
    assert list(it.expire(10)) == [first]
    assert list(it.expire(30)) == [second, flex]
    assert it.count == 0 and it.next_expiry() == math.inf


def test_a_shorter_longest_wait_holds_for_those_who_wait_already():
    it = queue()
    request, _ = join(it, D, now=0)
    settings = QueueSettings.load({"default": {"max_wait_s": 5}}, "queue")
    it.configure(settings, slots=8, ingresses=1)
    assert list(it.expire(6)) == [request]


def test_every_kth_grant_goes_to_the_starving():
    it = queue(starvation_every=3, default={"starvation_age_s": 10})
    for tier in [D] * 3 + [P] * 20:
        join(it, tier, now=0)
    served = [take(it, now=10).tier for _ in range(9)]
    assert served == [P, P, D, P, P, D, P, P, D]


def test_nobody_is_served_out_of_turn_before_the_starvation_age():
    it = queue(starvation_every=3, default={"starvation_age_s": 10})
    for tier in [D] * 3 + [P] * 20:
        join(it, tier, now=0)
    assert {take(it, now=9.9).tier for _ in range(20)} == {P}


def test_needs_that_cannot_be_met_do_not_hold_up_others():
    it = queue()
    stuck, _ = join(it, P, needs="embeddings")
    free, _ = join(it, P, needs="chat")
    assert it.take(lambda t: t.needs == "chat", anywhere, 0.0) is free
    assert it.take(lambda t: t.needs == "chat", anywhere, 0.0) is None
    assert take(it) is stuck


def test_tenants_are_fair_to_each_other_whatever_their_requests_need():
    it = queue()
    for _ in range(3):
        join(it, P, "greedy", tokens=100, needs="chat")
        join(it, P, "modest", tokens=10, needs="embeddings")
    assert [request.tenant for request in drain(it)][1:4] == ["modest"] * 3


def test_replays_that_never_waited_before_can_wait_side_by_side():
    it = queue()
    for needs in ("chat", "embeddings"):
        join(it, P, "a", replayed=True, needs=needs)
    assert len(drain(it)) == 2


def test_bounds_are_derived_from_the_slots_and_shared_by_the_ingresses():
    settings = QueueSettings()
    assert settings.bounds(slots=100, ingresses=2) == {P: 1600, D: 1200, F: 800}
    assert set(settings.bounds(slots=0, ingresses=1).values()) == {64}
    wider = QueueSettings.load({"flex": {"max_waiting": 7000}}, "queue")
    assert wider.bounds(slots=8, ingresses=1) == {P: 7000, D: 7000, F: 7000}
    assert settings.reserved(slots=100, ingresses=2) == {P: 100, D: 75, F: 50}
    assert set(settings.reserved(slots=0, ingresses=1).values()) == {4}
    assert set(wider.reserved(slots=8, ingresses=2).values()) == {219}
    few = {tier.value: {"max_waiting": 1} for tier in Tier}
    assert set(QueueSettings.load(few, "queue").reserved(slots=8, ingresses=2).values()) == {0}


@pytest.mark.parametrize(("slots", "kept"), [(1, 0), (2, 1), (8, 1), (10, 1), (11, 2), (256, 26)])
def test_headroom(slots, kept):
    assert QueueSettings().headroom_of(slots) == kept


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(
        SettingsError, match=r"queue\.flex\.max_wait_s: .*greater than 0 \(got -1\)"
    ):
        QueueSettings.load({"flex": {"max_wait_s": -1}}, "queue")
    with pytest.raises(SettingsError, match=r"queue\.headrom: there is no such setting"):
        QueueSettings.load({"headrom": 0.5}, "queue")


def test_retry_after_is_the_time_until_those_before_it_are_granted():
    it = queue(drain_window_s=10)
    for tick in range(1000):
        it.granted(QueuedRequest(D, "a", 1), tick * 0.5)
    assert it.grant_rate(D, 499.5) == pytest.approx(2, rel=0.05)
    for tier in [P] * 3 + [D] * 6 + [F] * 10:
        join(it, tier, now=499.5)
    assert it.retry_after(D, 499.5) == pytest.approx(10 / 2, rel=0.05)
    assert it.retry_after(F, 499.5) == pytest.approx(20 / 2, rel=0.05)


def test_retry_after_without_any_grant_is_the_longest():
    it = queue(max_retry_after_s=45)
    assert it.retry_after(P, 0.0) == 45
    it.granted(QueuedRequest(D, "a", 1), 0.0)
    assert it.retry_after(P, 0.0) == 45  # No priority request was granted.
    assert it.retry_after(D, 1e9) == 45  # That was long ago.


@given(st.floats(0.01, 1000), st.floats(0.1, 100))
def test_the_grant_rate_finds_a_steady_rate(rate, window):
    measured = GrantRate(window)
    for i in range(300):
        measured.count(i / rate)
    now = 300 / rate
    if now > 3:
        assert measured.per_second(now) == pytest.approx(rate, rel=0.25, abs=1.5 / window)
    assert measured.per_second(now + 20 * window) < rate / 1000


@given(st.floats(0, 100), st.floats(0, 100))
def test_retry_after_is_within_its_limits(began, later):
    it = queue(min_retry_after_s=2, max_retry_after_s=30)
    for _ in range(5):
        it.granted(QueuedRequest(F, "a", 1), began)
        assert 2 <= it.retry_after(F, began + later) <= 30


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), min_size=1, max_size=80),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), max_size=80),
)
def test_fairness_bound(first, later):
    """Two tenants that both wait all the time are given tokens that differ by at most the two
    largest requests, whoever else comes and goes."""
    it, waiting = queue(default={"max_waiting": 1000}), Counter()

    def joins(tenant, tokens):
        _, out = join(it, tenant=tenant, tokens=tokens)
        assert out is None
        waiting[tenant] += 1

    for tenant, tokens in first:
        joins(tenant, tokens)
    for _ in range(5):
        joins("x", 100)
        joins("y", 1)
    given_to = {"x": 0, "y": 0}
    more = iter(later)
    while waiting["x"] and waiting["y"]:
        request = take(it)
        waiting[request.tenant] -= 1
        if request.tenant in given_to:
            given_to[request.tenant] += request.tokens
        if (tenant_and_tokens := next(more, None)) is not None:
            joins(*tenant_and_tokens)
        assert abs(given_to["x"] - given_to["y"]) <= 2 * 100


def test_tenants_that_would_be_lifted_anyway_are_forgotten():
    it = queue()
    for tenant in range(10_000):
        it.granted(QueuedRequest(D, str(tenant), 10), 0.0)
    # private: to forget them changes nothing but the memory that is used.
    assert len(it._lanes[D]._counters) < 3_000  # noqa: SLF001


def test_a_hundred_thousand_wait_without_a_stall():
    it = queue(**{tier.value: {"max_waiting": 10**6} for tier in Tier})
    requests = [
        QueuedRequest(tier, str(i % 5_000), 1 + i % 90) for i, tier in enumerate([P, D, F] * 33_334)
    ]
    longest = 0.0
    began = time.process_time()
    for now, request in enumerate(requests):
        it.join(request, now * 1e-4)
    for request in requests[::20]:
        one = time.process_time()
        it.leave(request)
        longest = max(longest, time.process_time() - one)
    for _ in range(5_000):
        one = time.process_time()
        take(it, 10.0)
        longest = max(longest, time.process_time() - one)
    assert it.count == 100_002 - len(requests[::20]) - 5_000
    assert list(it.expire(1e6)) and it.count == 0
    assert longest < 0.05
    assert (time.process_time() - began) / 100_002 < 200e-6


class LineMachine(RuleBasedStateMachine):
    """The queue against a plain list of who waits."""

    @initialize(every=st.integers(2, 4))
    def begin(self, every):
        self.queue = queue(
            starvation_every=every,
            priority={"max_waiting": 9, "max_wait_s": 40, "reserved": 0},
            default={"max_waiting": 6, "max_wait_s": 40, "starvation_age_s": 10, "reserved": 1},
            flex={"max_waiting": 4, "max_wait_s": 60, "starvation_age_s": 20, "reserved": 2},
        )
        self.now = 0.0
        self.waiting = []
        self.done = set()
        self.out_of_turn = {}
        # With how many it was equally overdue at the most: those may all come before it.
        self.rivals = {}

    def leave(self, request):
        assert request in self.waiting, "it waits until it leaves, once"
        self.waiting.remove(request)
        assert request not in self.done
        self.done.add(request)

    @rule(
        tier=st.sampled_from(Tier),
        tenant=st.sampled_from("abc"),
        tokens=st.integers(1, 50),
        needs=st.sampled_from([None, "r"]),
        replayed=st.sampled_from([False, False, False, True]),
        start_within_s=st.sampled_from([math.inf, 0.1, 3.0, 12.0, 30.0]),
        raise_to=st.sampled_from([D, P]),
        raise_only=st.booleans(),
    )
    def joins(self, tier, tenant, tokens, needs, replayed, **raising):
        request = QueuedRequest(tier, tenant, tokens, needs=needs, replayed=replayed, **raising)
        reserved = {P: 0, D: 1, F: 2}
        counts = {one: sum(t.tier is one for t in self.waiting) for one in Tier}
        full = len(self.waiting) >= {P: 9, D: 6, F: 4}[tier]
        full &= not replayed
        over = [one for one in Tier if one.rank > tier.rank and counts[one] > reserved[one]]
        lower = [t for t in self.waiting if t.tier in over and not t.replayed]
        out = self.queue.join(request, self.now)
        self.waiting.append(request)
        if not full:
            assert out is None
        elif not lower:
            assert (out is request) is (counts[tier] >= reserved[tier])
            if out is not None:
                self.leave(request)
        else:
            lowest = max(t.tier.rank for t in lower)
            assert out is [t for t in lower if t.tier.rank == lowest][-1]
            self.leave(out)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves(self, data):
        request = data.draw(st.sampled_from(self.waiting))
        self.queue.leave(request)
        self.leave(request)

    @rule(usable=st.sets(st.tuples(st.sampled_from(Tier), st.sampled_from([None, "r"]))))
    def is_taken(self, usable):
        def room(request):
            return (request.tier, request.needs) in usable

        request = self.queue.take(room, room, self.now)
        candidates = [t for t in self.waiting if room(t)]
        if request is None:
            assert not candidates
            return
        self.leave(request)
        best = min(t.tier.rank for t in candidates)
        if request.tier.rank > best:
            self.check_starving(request)
        elif self.overdue(request) < 0 and not request.replayed:
            alike = [t for t in candidates if t.tier is request.tier and t.tenant == request.tenant]
            mine = [t for t in alike if t.needs == request.needs and t is not request]
            assert all(not t.replayed and t.number > request.number for t in mine)
        self.count_passed_over(request, room)

    def overdue(self, request):
        age = {P: math.inf, D: 10, F: 20}[request.tier]
        return self.now - request.since - age

    def check_starving(self, request):
        assert self.overdue(request) >= 0, "only the starving are served out of turn"
        older = [t for t in self.waiting if self.overdue(t) > self.overdue(request)]
        assert not older, "the one that is longest past its starvation age comes first"

    def count_passed_over(self, request, room):
        """The starvation bound: the request that is longest past its age sees at most k - 1
        grants to higher tiers, if it could use the slots."""
        starving = [t for t in self.waiting if self.overdue(t) >= 0]
        if not starving:
            self.out_of_turn.clear()
            return
        longest = max(self.overdue(t) for t in starving)
        for t in starving:
            if self.overdue(t) == longest and t.tier.rank > request.tier.rank and room(t):
                self.out_of_turn[t] = self.out_of_turn.get(t, 0) + 1
                rivals = sum(self.overdue(o) == longest for o in starving)
                self.rivals[t] = max(rivals, self.rivals.get(t, 1))
                turns = self.queue.settings.starvation_every - 1
                assert self.out_of_turn[t] <= self.rivals[t] * turns

    @rule(seconds=st.floats(0.1, 15), delivers=st.booleans())
    def time_passes(self, seconds, delivers):
        self.now += seconds
        while self.are_raised(delivers):
            pass
        for request in self.queue.expire(self.now):
            self.leave(request)

    def are_raised(self, delivers):
        def raise_to(request):
            tier = request.raise_to
            if tier is P and not delivers:
                tier = None if request.raise_only else D
            return tier if tier is not None and tier.rank < request.tier.rank else None

        def due_at(request):
            return request.since + request.start_within_s

        def is_due(request):
            first = request.raised_from is None and not request.replayed
            return first and due_at(request) <= self.now and raise_to(request) is not None

        before = [(t, t.tier, t.since, is_due(t)) for t in self.waiting]
        raised = self.queue.raise_due(self.now, raise_to, lambda _: 1)
        changed = [t for t, tier, since, due in before if t.tier is not tier]
        assert raised is bool(changed)
        for request, tier, since, due in before:
            assert request.since == since
            if request in changed:
                assert due and request.raised_from is tier and request.tier.rank < tier.rank
        reserved, counts = {P: 0, D: 1, F: 2}, Counter(t.tier for t in self.waiting)
        if raised:
            self.out_of_turn.clear()
            self.rivals.clear()
            return True
        for request in filter(is_due, self.waiting):
            to = raise_to(request)
            assert len(self.waiting) > {P: 9, D: 6, F: 4}[to]
            assert counts[request.tier] <= reserved[request.tier] and counts[to] >= reserved[to]
        later = [due_at(t) for t in self.waiting if t.raised_from is None and not t.replayed
                 and t.raise_to.rank < t.tier.rank and due_at(t) > self.now]  # fmt: skip
        assert self.queue.next_raise() == min(later, default=math.inf)
        return False

    @precondition(lambda self: self.done)
    @rule(tokens=st.integers(1, 200), data=st.data())
    def is_settled(self, tokens, data):
        request = data.draw(st.sampled_from(sorted(self.done, key=lambda t: t.number)))
        self.queue.settle(request, tokens)

    @invariant()
    def is_whole(self):
        it = self.queue
        assert it.count == len(self.waiting)
        for tier in Tier:
            mine = [t for t in self.waiting if t.tier is tier]
            assert it.waiting(tier) == len(mine)
            assert it.oldest_s(tier, self.now) == max((self.now - t.since for t in mine), default=0)
            assert all(
                self.now - t.since < (60 if F in (tier, t.raised_from) else 40) for t in mine
            )
        for tier, bound in ((P, 9 + 1 + 2), (D, 6 + 1 + 2), (F, 4)):
            below = [t for t in self.waiting if t.tier.rank >= tier.rank and not t.replayed]
            assert len(below) <= bound

    def teardown(self):
        """Whoever waits can be taken, once."""
        if hasattr(self, "queue"):
            assert Counter(drain(self.queue, self.now)) == Counter(self.waiting)


TestLineMachine = LineMachine.TestCase
TestLineMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
