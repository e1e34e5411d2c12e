"""The scheduler's promises, computed from first principles after every event."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.config.queue import QueueSettings
from app.core.shed_reason import ShedReason
from app.core.tiers import PriorityMode, Tier
from app.flow.credits import RENEWAL_S, SILENCE_S
from app.flow.request import QueuedRequest
from app.flow.scheduler import GIVE_UP_S, SUSPENSION_S
from tests.support.floor import (
    CHAT,
    EMBED,
    ENDED,
    EVERYWHERE,
    PLACED,
    SHED,
    WAITING,
    D,
    F,
    Floor,
    P,
)

pytestmark = pytest.mark.unit


def wanted(floor, request):
    """The slots that a request takes, worked out from first principles."""
    if request.route == EMBED:
        return 1  # there are no more inputs than fit in one
    offers = list(floor.offers.values())
    most = max((offer.slots for offer in offers), default=1)
    if request.tier is P:
        # Where a pool has one replica, others keep headroom there.
        own = floor.scheduler.credits.slot_table.headroom
        pools = [[o for o in offers if o.pool == pool] for pool in {o.pool for o in offers}]
        most = max(
            (
                pool[0].slots - max(0, QueueSettings().headroom_of(pool[0].slots) - own)
                if len(pool) == 1 and keeps_headroom(floor, pool[0])
                else max(offer.slots for offer in pool)
                for pool in pools
            ),
            default=1,
        )
    else:
        kept = [offer for offer in offers if keeps_headroom(floor, offer)]
        pools = {offer.pool for offer in kept}
        in_pools = [sum(o.slots for o in kept if o.pool == pool) for pool in pools]
        free = sum(n - QueueSettings().headroom_of(n) for n in in_pools)
        most = max(
            1,
            min(free, max((offer.slots for offer in kept), default=0)),
            *(offer.slots for offer in offers if offer not in kept),
        )
    return min(request.sequences, most)


def keeps_headroom(floor, offer):
    if offer.preempts:
        return False
    if floor.mode is PriorityMode.AUTO:
        return bool(offer.routes)
    return floor.mode is PriorityMode.QUEUE


def usable(floor, request):
    """The replicas that a request may use in its turn, worked out from first principles."""
    table, now, want = floor.scheduler.credits.slot_table, floor.now, wanted(floor, request)
    if now >= floor.fresh_until:
        return []
    ready = [
        place
        for place in table
        if place.replica_id in floor.offers and floor.suspended.get(place.replica_id, 0) <= now
    ]
    able = [place for place in ready if place.replica_id not in request.without]
    offers = {place: floor.offers[place.replica_id] for place in ready}
    honouring = [
        place
        for place in able
        if floor.mode is PriorityMode.QUEUE
        or (floor.mode is PriorityMode.AUTO and request.route in offers[place].routes)
    ]
    gathering = floor.scheduler.gathering
    held_back = None
    if gathering is not None and gathering.keeps_out(request):
        held_back = gathering.replica_id
        able = [place for place in able if place.replica_id != held_back]
    first = request.tier is P and bool(honouring)
    rank = 0 if first else max(request.tier.rank, D.rank)
    if first:
        able = [place for place in able if place in honouring]
    idle = {place: max(0, place.credit - place.running) for place in ready}

    def room(place):
        """For a request of this tier, and where the engine preempts for it."""
        if not offers[place].preempts:
            return idle[place]
        taken = sum(place.taken[: rank + 1])
        most = place.credit if rank or place.limit is None else place.limit
        may = most - taken
        return may if request.route in offers[place].routes else min(idle[place], may)

    kept = sum(
        idle[place]
        for place in ready
        if keeps_headroom(floor, offers[place]) and (first or place.replica_id != held_back)
    )
    enough = first or kept - want >= table.headroom
    return {
        place.replica_id
        for place in able
        if room(place) >= want and (enough or not keeps_headroom(floor, offers[place]))
    }


class GateFloor(Floor):
    """A floor with what the machine below keeps about grants and replicas."""

    def __init__(self, mode, **values):
        super().__init__(mode, **values)
        self.fresh_until, self.gives_up_at = -math.inf, math.inf
        self.gives_up_for = ShedReason.NOT_OFFERED
        self.suspended = {}
        self.rests = False


class GateMachine(RuleBasedStateMachine):
    @initialize(mode=st.sampled_from([PriorityMode.AUTO, PriorityMode.AUTO, PriorityMode.QUEUE]))
    def begin(self, mode):
        self.floor = GateFloor(
            mode,
            starvation_every=3,
            priority={"max_waiting": 8, "max_wait_s": 20, "reserved": 0},
            default={"max_waiting": 6, "max_wait_s": 20, "starvation_age_s": 4, "reserved": 0},
            flex={"max_waiting": 4, "max_wait_s": 30, "starvation_age_s": 8, "reserved": 0},
        )
        self.names = 0
        self.number, self.changed_at = 0, math.inf
        self.requests = []
        self.placed = []
        self.waiting = []
        self.add_replica(3, EVERYWHERE, False)

    # What the requests that an event calls must look like.

    def call(self, called):
        for request in called:
            assert request in self.waiting, "nobody is called who does not wait, or twice"
            self.waiting.remove(request)
            assert request.state in (PLACED, SHED)
            if request.state is PLACED:
                self.placed.append(request)
        for request in called:
            if request.state is PLACED and not self.starved(request):
                for other in self.waiting:
                    ahead = other.tier.rank < request.tier.rank and other.slots <= request.slots
                    assert not (ahead and self.could_use(other, request.replica_id))

    def starved(self, request):
        age = {P: math.inf, D: 4, F: 8}[request.tier]
        return self.floor.now - request.since >= age

    def could_use(self, request, replica_id):
        floor = self.floor
        if replica_id in request.without:
            return False
        limit = floor.scheduler.credits.slot_table[replica_id].limit
        if limit is not None and floor.offers[replica_id].preempts:
            return False
        if request.tier is not P or floor.mode is not PriorityMode.AUTO:
            return True
        honouring = [
            offer.replica_id
            for offer in floor.offers.values()
            if request.route in offer.routes
            and floor.suspended.get(offer.replica_id, 0) <= floor.now
        ]
        return replica_id in honouring

    def settle(self, request, called):
        """File a request that was just admitted, after those that were called meanwhile."""
        {PLACED: self.placed, WAITING: self.waiting, SHED: []}[request.state].append(request)
        for other in called:
            assert other is not request
        self.call(called)

    @rule(
        tier=st.sampled_from(Tier),
        tenant=st.sampled_from("ab"),
        tokens=st.integers(1, 50),
        route=st.sampled_from([CHAT, CHAT, EMBED]),
        prefix=st.none() | st.integers(0, 2**32 - 1),
        fail_fast=st.sampled_from([False, False, False, True]),
        sequences=st.sampled_from([1, 1, 1, 2, 3, 20]),
        start_within_s=st.sampled_from([math.inf, 0.05, 3.0, 12.0]),
        raise_to=st.sampled_from([D, P]),
        raise_only=st.booleans(),
    )
    def arrives(self, tier, tenant, tokens, route, prefix, fail_fast, sequences, **raising):
        floor = self.floor
        self.call(floor.scheduler.tick(floor.now))
        request = QueuedRequest(
            tier, tenant, tokens, route, prefix, fail_fast, sequences, **raising
        )
        room = usable(floor, request)
        called = floor.scheduler.arrive(request, floor.now)
        if room and request.tier is tier:
            assert request.state is PLACED and request.replica_id in room
        if request.state is SHED and floor.now >= floor.gives_up_at:
            assert request.shed is floor.gives_up_for
        elif request.state is SHED:
            assert fail_fast or request.shed is ShedReason.QUEUE_FULL
        assert request.state is not WAITING or not fail_fast
        self.requests.append(request)
        self.settle(request, called)

    @rule(withdrawn=st.sampled_from([None, None, ShedReason.NOT_OFFERED, ShedReason.ENGINE_FAILED]))
    def nodes_change(self, withdrawn):
        floor = self.floor
        if withdrawn is None:
            floor.scheduler.offer()
            floor.gives_up_at = math.inf
        else:
            floor.scheduler.withdraw(floor.now, withdrawn)
            floor.gives_up_for = withdrawn
            floor.gives_up_at = min(floor.gives_up_at, floor.now + GIVE_UP_S)

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), tokens=st.none() | st.integers(1, 100))
    def finishes(self, data, tokens):
        request = data.draw(st.sampled_from(self.placed))
        self.placed.remove(request)
        self.call(self.floor.end(request, tokens))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves(self, data):
        request = data.draw(st.sampled_from(self.waiting))
        called = self.floor.scheduler.end(request, self.floor.now)
        if request in called:
            self.call(called)
        else:
            self.waiting.remove(request)
            self.call(called)
            assert request.state is ENDED

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def ends_again(self, data):
        request = data.draw(st.sampled_from(self.requests))
        if request.state in (SHED, ENDED):
            self.call(self.floor.end(request))

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), suspend=st.booleans())
    def loses_its_replica(self, data, suspend):
        request, floor = data.draw(st.sampled_from(self.placed)), self.floor
        self.call(floor.scheduler.tick(floor.now))
        if request not in self.placed:
            return
        self.placed.remove(request)
        if suspend and request.replica_id in floor.offers:
            floor.suspended[request.replica_id] = floor.now + SUSPENSION_S
        called = floor.scheduler.lost(request, floor.now, suspend=suspend)
        assert request.replica_id not in request.without or request.state is not PLACED
        self.settle(request, called)

    @rule(
        credit=st.integers(0, 4),
        routes=st.sampled_from([EVERYWHERE, {CHAT}, ()]),
        preempts=st.booleans(),
    )
    def add_replica(self, credit, routes, preempts):
        self.names += 1
        self.floor.fresh_until = self.floor.now + SILENCE_S
        pool = "native" if routes else "plain"
        self.wake()
        preempts = preempts and bool(routes)
        self.call(
            self.floor.add(f"r{self.names}", credit, routes=routes, pool=pool, preempts=preempts)
        )

    @precondition(lambda self: self.floor.offers)
    @rule(data=st.data())
    def remove_replica(self, data):
        del self.floor.offers[data.draw(st.sampled_from(sorted(self.floor.offers)))]
        self.call(self.floor.set_replicas())

    def wake(self):
        self.floor.rests = False
        self.floor.scheduler.wake()

    @precondition(lambda self: not self.floor.offers)
    @rule(rests=st.booleans())
    def begins_or_ends_its_rest(self, rests):
        if rests:
            self.floor.rests = True
            self.floor.scheduler.sleep(20.0, None)
        else:
            self.wake()
        self.call(self.floor.set_replicas())

    @rule(
        data=st.data(),
        headroom=st.none() | st.integers(0, 3),
        at_most=st.dictionaries(st.sampled_from(["native", "plain"]), st.integers(0, 6)),
        anew=st.sampled_from([False] * 6 + [True]),
    )
    def is_granted(self, data, headroom, at_most, anew):
        floor = self.floor
        names = st.sampled_from([*sorted(floor.offers), "unknown"])
        added = data.draw(st.dictionaries(names, st.integers(1, 3), max_size=2))
        limits = data.draw(st.dictionaries(names, st.integers(0, 4), max_size=2))
        for_tier = data.draw(st.dictionaries(st.sampled_from(["native"]), st.sampled_from([D, F])))
        left = st.tuples(st.integers(0, 2), st.integers(0, 2))
        leave = data.draw(st.dictionaries(names, left, max_size=1))
        floor.fresh_until = floor.now + SILENCE_S
        self.call(
            floor.grant(
                added, headroom, at_most, anew=anew, limits=limits, for_tier=for_tier, leave=leave
            )
        )

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 11.0]), word=st.booleans())
    def time_passes(self, seconds, word):
        floor = self.floor
        floor.now += seconds
        if word:
            if floor.now < floor.fresh_until:
                floor.fresh_until = floor.now + SILENCE_S
            demand = floor.demand()
            self.call(floor.scheduler.renewal_failed(demand, floor.now))
        else:
            self.call(floor.scheduler.tick(floor.now))

    @invariant()
    def nothing_is_lost_or_counted_twice(self):
        for request in self.placed:
            assert request.state is PLACED
        for request in self.waiting:
            assert request.state is WAITING
        queue = self.floor.scheduler.queue
        assert queue.count == len(self.waiting)
        for tier in Tier:
            mine = [request.slots for request in self.waiting if request.tier is tier]
            assert queue.wanted(tier) == sum(mine)
            assert all(slots >= 1 for slots in mine)
        running = {}
        for request in self.placed:
            one = running.setdefault(request.replica_id, [0, 0])
            one[0] += request.slots
            one[1] += request.slots * (request.tier is not P)
        for place in self.floor.scheduler.credits.slot_table:
            assert [place.running, place.others] == running.pop(place.replica_id, [0, 0])
        assert not running, "what runs on a replica that is gone is still counted"

    @invariant()
    def nobody_waits_while_a_slot_is_free_that_he_may_use(self):
        for request in self.waiting:
            assert not usable(self.floor, request)

    @invariant()
    def nobody_waits_for_a_replica_that_nobody_expects(self):
        for request in self.waiting:
            others = self.floor.offers.keys() - request.without
            assert not request.without or others or self.floor.rests

    @invariant()
    def what_changes_is_told_within_a_renewal(self):
        floor, scheduler = self.floor, self.floor.scheduler
        if floor.told is None:
            return
        number, *told = floor.told
        says = [
            scheduler.credits.slot_table.held(),
            {tier: sum(one.slots for one in self.placed if one.tier is tier) for tier in Tier},
            {tier: scheduler.queue.wanted(tier) for tier in Tier},
        ]
        if number != self.number or says == told:
            self.number, self.changed_at = number, math.inf
        if says != told:
            self.changed_at = min(self.changed_at, floor.now)
        assert scheduler.renewal_at() <= floor.told_at + SILENCE_S / 3
        assert scheduler.renewal_at() <= self.changed_at + RENEWAL_S

    @invariant()
    def those_that_have_not_started_in_time_are_raised(self):
        scheduler = self.floor.scheduler
        for request in self.waiting:
            if request.raised_from is not None:
                assert request.tier.rank < request.raised_from.rank and not request.fail_fast
                assert request.tier in (request.raise_to, D)
                assert request.tier is request.raise_to or not request.raise_only
                continue
            if request.replayed or request.raise_to.rank >= request.tier.rank:
                continue
            due_at = request.since + request.start_within_s
            if due_at > self.floor.now:
                assert scheduler.next_tick() <= due_at
                continue
            assert request.raise_to is P and not scheduler.delivers_priority(request.route)
            assert request.raise_only or request.tier is D

    @invariant()
    def bounds_hold(self):
        limits = {P: (8, 20), D: (6, 20), F: (4, 30)}
        for tier, (most, longest) in limits.items():
            mine = [t for t in self.waiting if t.tier.rank >= tier.rank and not t.replayed]
            assert len(mine) <= most
            for request in (t for t in self.waiting if t.tier is tier):
                before = limits[request.raised_from or tier][1]
                assert self.floor.now - request.since < max(longest, before)
        assert not self.waiting or self.floor.now < self.floor.gives_up_at

    def teardown(self):
        if not hasattr(self, "floor"):
            return
        while self.placed:
            self.call(self.floor.end(self.placed.pop()))
        for request in self.waiting:
            self.floor.end(request)
        assert all(p.running == p.others == 0 for p in self.floor.scheduler.credits.slot_table)
        assert self.floor.scheduler.queue.count == 0


TestGateMachine = GateMachine.TestCase
TestGateMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
