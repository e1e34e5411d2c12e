"""The scheduler against what its docstring promises, worked out the slow way after every event."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.config.queue import QueueSettings
from app.contracts.credits import Gathers, Grant
from app.core.shed_reason import ShedReason
from app.core.tiers import PriorityMode, Tier
from app.flow.credits import QUIET_S, RENEWAL_S, SILENCE_S
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import GIVE_UP_S, SUSPENSION_S, Scheduler
from app.flow.slots import Offer

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
CHAT, EMBED = "chat", "embeddings"
EVERYWHERE = frozenset({CHAT, EMBED})
NEW, WAITING, PLACED, SHED, ENDED = RequestState


class Floor:
    """A scheduler and what surrounds it: replicas, a Model that grants at will, and a clock."""

    def __init__(self, mode=PriorityMode.AUTO, **values):
        self.scheduler = Scheduler("ingress", QueueSettings.load(values, "queue"))
        self.now = 0.0
        self.mode = mode
        self.offers = {}
        self.grants = 0
        self.told, self.told_at = None, -math.inf

    def demand(self):
        demand = self.scheduler.demand(self.now)
        self.told = (demand.number, demand.held, demand.running, demand.waiting)
        self.told_at = self.now
        return demand

    def add(self, replica_id, credit, *, routes=EVERYWHERE, pool="pool", slots=8, preempts=False):
        offer = Offer(replica_id, pool, slots, frozenset(routes), preempts=preempts)
        self.offers[replica_id] = offer
        called = self.set_replicas()
        return called + self.grant({replica_id: credit})

    def set_replicas(self):
        return self.scheduler.set_replicas(self.offers.values(), self.mode, self.now)

    def grant(self, added=(), headroom=None, at_most=(), **more):
        self.grants += 1
        number = self.demand().number
        grant = Grant(
            "model", self.grants, number, self.now, headroom=headroom,
            added=dict(added), at_most=dict(at_most), **more,
        )  # fmt: skip
        return self.scheduler.receive(grant, self.now)

    def arrive(self, tier=D, *, tenant="a", tokens=10, route=CHAT, **more):
        request = QueuedRequest(tier, tenant, tokens, route, **more)
        return request, self.scheduler.arrive(request, self.now)

    def place(self, *args, **more):
        request, called = self.arrive(*args, **more)
        assert request.state is PLACED and not called
        return request

    def wait(self, *args, **more):
        request, called = self.arrive(*args, **more)
        assert request.state is WAITING and not called
        return request

    def end(self, request, tokens=None):
        return self.scheduler.end(request, self.now, tokens)


def test_a_request_that_finds_room_is_placed_at_once():
    floor = Floor()
    floor.add("one", 2)
    request = floor.place()
    assert request.replica_id == "one"
    assert floor.end(request, tokens=25) == []
    assert request.state is ENDED


def test_the_next_in_line_gets_the_slot_that_comes_free():
    floor = Floor()
    floor.add("one", 1)
    running = floor.place()
    default, flex, priority = floor.wait(D), floor.wait(F), floor.wait(P)
    assert floor.end(running) == [priority]
    assert floor.end(priority) == [default]
    assert floor.end(default) == [flex]
    assert floor.end(flex) == []


def test_new_capacity_takes_the_backlog():
    floor = Floor()
    floor.add("one", 1)
    floor.place()
    waiting = [floor.wait() for _ in range(5)]
    assert floor.grant({"one": 1}) == waiting[:1]
    assert floor.add("two", 2) == waiting[1:3]
    assert {request.replica_id for request in waiting[1:3]} == {"two"}


def test_credits_on_a_replica_that_is_not_known_yet_count_once_it_is():
    floor = Floor()
    waiting = floor.wait()
    assert floor.grant({"one": 1}) == []
    floor.offers["one"] = Offer("one", "pool", 8, EVERYWHERE)
    assert floor.set_replicas() == [waiting]


def test_headroom_is_kept_free_for_priority():
    floor = Floor()
    floor.add("one", 4)
    floor.grant(headroom=2)
    defaults = [floor.place(D), floor.place(F)]
    waiting = floor.wait(D)
    priority = [floor.place(P), floor.place(P)]
    floor.wait(P)
    # The headroom comes first: nobody else gets a slot before it is free again.
    assert [request.tier for request in floor.end(defaults[0])] == [P]
    assert floor.end(defaults[1]) == []
    assert floor.end(priority[0]) == []
    assert floor.end(priority[1]) == [waiting]


def test_a_replica_without_priority_keeps_no_headroom():
    floor = Floor()
    floor.add("plain", 1, routes=())
    floor.grant(headroom=1)
    floor.place(D)


def test_priority_goes_where_it_is_honoured_and_waits_for_it():
    floor = Floor()
    floor.add("plain", 5, routes=(), pool="plain")
    floor.add("native", 1)
    assert floor.place(P).replica_id == "native"
    waiting = floor.wait(P)
    assert waiting.tier is P


def test_priority_on_a_route_that_no_replica_honours_stands_as_default():
    floor = Floor()
    floor.add("one", 2, routes={CHAT})
    floor.grant(headroom=1)
    assert floor.place(P, route=EMBED).tier is D
    waiting, _ = floor.arrive(P, route=EMBED)
    assert waiting.tier is D and waiting.state is WAITING


def test_the_line_counts_as_delivery_where_the_operator_says_so():
    floor = Floor(PriorityMode.QUEUE)
    floor.add("plain", 2, routes=())
    floor.grant(headroom=1)
    floor.place(D)
    floor.wait(D)
    assert floor.place(P).tier is P


def test_priority_that_waits_is_served_as_others_once_no_replica_honours_it():
    floor = Floor()
    floor.add("native", 1)
    floor.place(P)
    waiting = floor.wait(P)
    floor.offers.clear()
    floor.set_replicas()
    assert floor.add("plain", 1, routes=()) == [waiting]


def test_while_no_replica_is_ready_requests_wait_for_one():
    floor = Floor()
    priority = floor.wait(P)
    assert priority.tier is P
    assert floor.add("one", 1) == [priority]


def test_fail_fast_is_shed_only_when_there_is_no_room():
    floor = Floor()
    floor.add("one", 1)
    floor.place(fail_fast=True)
    request, called = floor.arrive(P, fail_fast=True)
    assert request.state is SHED and request.shed is ShedReason.FAIL_FAST and called == []
    assert request.retry_after_s > 0


def test_a_full_line_sheds_the_newcomer_or_the_lowest():
    two = {"max_waiting": 2, "reserved": 0}
    floor = Floor(priority=two, default=two, flex=two)
    floor.wait(D)
    flex = floor.wait(F)
    default, called = floor.arrive(D)
    assert called == [flex] and flex.shed is ShedReason.DISPLACED and default.state is WAITING
    late, called = floor.arrive(D)
    assert late.shed is ShedReason.QUEUE_FULL and called == []


def test_a_wait_that_is_too_long_ends():
    floor = Floor(default={"max_wait_s": 5})
    request = floor.wait()
    assert floor.scheduler.next_tick() == 5
    floor.now = 5
    assert floor.scheduler.tick(5) == [request]
    assert request.shed is ShedReason.WAITED_TOO_LONG
    assert floor.scheduler.next_tick() == math.inf


def test_who_waits_is_turned_away_once_there_has_been_no_node_for_an_engine_for_a_while():
    floor = Floor()
    priority, flex = floor.wait(P), floor.wait(F)
    floor.now = 1.0
    floor.scheduler.withdraw(floor.now)
    later = floor.wait(D)
    floor.now = 2.0
    floor.scheduler.withdraw(floor.now)  # said again, it counts from the first time
    assert floor.scheduler.next_tick() == 1.0 + GIVE_UP_S
    assert floor.scheduler.tick(1.0 + GIVE_UP_S - 0.1) == []
    floor.now = 1.0 + GIVE_UP_S
    turned_away = floor.scheduler.tick(floor.now)
    assert set(turned_away) == {priority, later, flex} and floor.scheduler.queue.count == 0
    assert {request.shed for request in turned_away} == {ShedReason.NOT_OFFERED}
    assert floor.scheduler.next_tick() == math.inf
    # Nor does anybody begin to wait, not even who does not want to.
    for newcomer in (floor.arrive(P)[0], floor.arrive(fail_fast=True)[0]):
        assert newcomer.shed is ShedReason.NOT_OFFERED


def test_who_waits_stays_where_a_node_comes_in_time():
    floor = Floor()
    request = floor.wait()
    floor.scheduler.withdraw(0.0)
    floor.now = GIVE_UP_S - 0.1
    floor.scheduler.offer()
    assert floor.scheduler.next_tick() > GIVE_UP_S
    floor.now = 2 * GIVE_UP_S
    assert floor.scheduler.tick(floor.now) == [] and request.state is WAITING
    # The next time counts from its own beginning.
    floor.scheduler.withdraw(floor.now)
    assert floor.scheduler.next_tick() == 3 * GIVE_UP_S
    assert floor.add("one", 1) == [request] and request.state is PLACED


def test_what_runs_goes_on_where_no_node_is_offered_but_is_not_replayed():
    floor = Floor()
    floor.add("one", 2)
    running, lost = floor.place(), floor.place()
    floor.scheduler.withdraw(0.0)
    floor.now = GIVE_UP_S
    assert floor.scheduler.tick(floor.now) == []
    assert running.state is PLACED
    floor.scheduler.lost(lost, floor.now)
    assert lost.shed is ShedReason.NOT_OFFERED
    assert floor.end(running) == [] and running.state is ENDED


def test_a_client_that_goes_while_it_waits_leaves_the_line_at_once():
    floor = Floor()
    request, other = floor.wait(), floor.wait()
    assert floor.end(request) == []
    assert floor.scheduler.queue.count == 1
    assert floor.add("one", 2) == [other]


@pytest.mark.parametrize("state", [NEW, SHED, ENDED])
def test_the_end_of_a_request_without_a_place_frees_nothing(state):
    floor = Floor()
    floor.add("one", 1)
    running = floor.place()
    request = QueuedRequest(D, "a", 1)
    request.state, request.replica_id = state, "one"
    assert floor.end(request) == []
    assert floor.scheduler.credits.slot_table["one"].running == 1
    floor.end(running)
    assert floor.end(running) == []
    assert floor.scheduler.credits.slot_table["one"].running == 0


def test_a_lost_replica_is_left_alone_for_a_while():
    floor = Floor()
    floor.add("one", 2)
    floor.add("two", 1)
    request = floor.place()
    lost = request.replica_id
    assert floor.scheduler.lost(request, 0.0) == []
    other = request.replica_id
    assert request.state is PLACED and {lost, other} == {"one", "two"}
    floor.now = SUSPENSION_S - 0.1
    while (waiting := floor.arrive()[0]).state is not WAITING:
        assert waiting.replica_id == other
    floor.now = SUSPENSION_S
    assert waiting in floor.scheduler.tick(floor.now)
    assert waiting.replica_id == lost


def test_a_replica_that_only_failed_one_request_goes_on_getting_others():
    floor = Floor()
    floor.add("one", 2)
    floor.add("two", 1)
    request = floor.place()
    failed = request.replica_id
    floor.scheduler.lost(request, 0.0, suspend=False)
    assert request.state is PLACED and request.replica_id != failed
    assert floor.place().replica_id == floor.place().replica_id == failed


def test_priority_that_failed_on_the_only_replica_that_honours_it_goes_elsewhere():
    floor = Floor()
    floor.add("one", 2)
    floor.add("plain", 1, routes=(), pool="plain")
    request = floor.place(P)
    assert request.replica_id == "one"
    floor.scheduler.lost(request, 0.0, suspend=False)
    assert request.state is PLACED and request.replica_id == "plain"
    assert floor.place(P).replica_id == "one", "others it may honour"


def test_when_a_suspension_ends_those_who_wait_come_before_newcomers():
    floor = Floor()
    floor.add("one", 1)
    floor.scheduler.lost(floor.place(), 0.0)
    waiting = floor.wait()
    floor.now = SUSPENSION_S
    newcomer, called = floor.arrive()
    assert called == [waiting] and newcomer.state is WAITING


def test_a_request_is_not_placed_again_where_it_was_lost():
    floor = Floor()
    floor.add("one", 4)
    floor.add("two", 0)
    request = floor.place()
    assert floor.scheduler.lost(request, 0.0) == []
    assert request.state is WAITING, "the other replica has no room yet"
    floor.now = 10.0
    assert floor.grant() == [] and floor.scheduler.credits.slot_table.free == 4
    assert floor.grant({"two": 1}) == [request] and request.replica_id == "two"


@pytest.mark.parametrize("fail_fast", [False, True])
def test_a_request_that_the_only_replica_lost_is_shed_at_once(fail_fast):
    floor = Floor()
    floor.add("one", 4)
    request = floor.place(fail_fast=fail_fast)
    assert floor.scheduler.lost(request, 0.0) == []
    assert (request.state, request.shed) == (SHED, ShedReason.NO_OTHER_REPLICA)
    assert floor.scheduler.credits.slot_table["one"].running == 0


def test_a_lost_request_waits_no_longer_once_the_other_replica_goes():
    floor = Floor()
    floor.add("one", 1)
    floor.add("two", 0)
    request, waiting = floor.place(), floor.wait()
    floor.scheduler.lost(request, 0.0)
    assert request.state is WAITING
    del floor.offers["two"]
    assert floor.set_replicas() == [request]
    assert (request.state, request.shed) == (SHED, ShedReason.NO_OTHER_REPLICA)
    assert waiting.state is WAITING, "the replica that is left has not failed this one"


def test_a_lost_request_waits_for_a_model_that_wakes_and_no_longer():
    floor = Floor()
    floor.add("one", 1)
    request = floor.place()
    floor.offers.clear()
    floor.scheduler.sleep(20.0, 0.0)
    floor.set_replicas()
    assert floor.scheduler.lost(request, 0.0) == [] and request.state is WAITING
    floor.scheduler.wake()
    assert floor.set_replicas() == [request], "its start has failed"
    assert request.shed is ShedReason.NO_OTHER_REPLICA


def test_a_lost_request_comes_first_among_its_tenants_even_in_a_full_line():
    one = {"max_waiting": 1, "reserved": 0}
    floor = Floor(default=one, flex=one, priority=one)
    floor.add("one", 1)
    floor.add("two", 0)
    request = floor.place()
    waiting = floor.wait()
    assert floor.scheduler.lost(request, 0.0) == []
    assert floor.grant({"two": 2}) == [request, waiting]


def test_silence_closes_the_gate_until_there_is_word():
    floor = Floor()
    floor.add("one", 2)
    floor.now = SILENCE_S
    waiting = floor.wait()
    assert floor.grant() == [waiting]


def test_while_the_model_is_known_to_be_down_the_gate_stays_open():
    floor = Floor()
    floor.add("one", 9)
    for _ in range(8):
        floor.now += 2.0
        demand = floor.scheduler.demand(floor.now)
        floor.now += 0.5
        assert floor.scheduler.renewal_failed(demand, floor.now) == []
        floor.place()
    floor.now += SILENCE_S
    late = floor.scheduler.demand(floor.now)
    waiting = floor.wait()
    assert floor.scheduler.renewal_failed(late, floor.now) == []
    assert waiting.state is WAITING, "its credits may have been given away before"


def test_what_is_too_much_is_given_up_when_its_slot_is_free():
    floor = Floor()
    floor.add("one", 3)
    running = [floor.place(), floor.place()]
    waiting = []
    floor.grant(at_most={"pool": 1})
    assert floor.scheduler.credits.slot_table["one"].credit == 2
    waiting.append(floor.wait())
    assert floor.end(running[0]) == []
    assert floor.scheduler.credits.slot_table["one"].credit == 1
    assert floor.end(running[1]) == waiting
    assert floor.scheduler.demand(0.0).held == {"one": (1, 1)}


def test_renewals_are_due_at_once_when_priority_waits_then_less_often():
    floor = Floor()
    scheduler = floor.scheduler
    scheduler.demand(0.0)
    assert scheduler.renewal_at() == 0.25
    floor.wait(P)
    assert scheduler.renewal_at() == 0.0
    pauses, now = [], 0.1
    for _ in range(6):
        scheduler.demand(now)
        pauses.append(round(scheduler.renewal_at() - now, 6))
        now = scheduler.renewal_at()
    assert pauses == [0.025, 0.05, 0.1, 0.2, 0.25, 0.25]


def test_an_ingress_that_has_nothing_new_to_say_renews_less_often():
    floor = Floor()
    scheduler = floor.scheduler
    floor.add("one", 2)
    assert scheduler.renewal_at() == 0.25, "what it was given is to be acknowledged"
    floor.now = 0.25
    floor.grant(headroom=0)
    assert scheduler.renewal_at() == 0.25 + QUIET_S
    floor.now = 0.9
    running = floor.place()
    assert scheduler.renewal_at() == 1.0, "when it would be due had none been left out"
    floor.now = 1.0
    floor.grant(headroom=0)
    assert scheduler.renewal_at() == 1.0 + QUIET_S, "it still runs, which is nothing new"
    floor.now = 1.3
    floor.place()
    waiting = floor.wait()
    assert scheduler.renewal_at() == 1.25, "somebody waits, so what was left out is due now"
    floor.grant(headroom=0)
    assert scheduler.renewal_at() == 1.55
    floor.end(waiting)
    assert scheduler.renewal_at() == 1.55, "that nobody waits any more is new"
    floor.now = 1.55
    floor.grant(headroom=0)
    floor.now = 1.6
    assert floor.end(running) == []
    assert scheduler.renewal_at() == 1.8
    floor.now = 2.0
    floor.demand()
    assert scheduler.renewal_at() == 2.25, "nobody knows whether the Model has heard it"


def test_an_ingress_asks_a_model_that_only_listens_until_it_gives_something():
    floor = Floor()
    floor.add("one", 2)
    floor.grant()
    assert floor.scheduler.renewal_at() == 0.25


def test_a_starving_request_may_go_below_the_headroom_but_not_take_all():
    floor = Floor(starvation_every=2, default={"starvation_age_s": 5})
    floor.add("one", 2)
    floor.grant(headroom=1)
    priority = [floor.place(P), floor.place(P)]
    starving = [floor.wait(D), floor.wait(D)]
    floor.now = 5.0 - 1e-6
    floor.grant()
    floor.now = 5.0
    # One slot is free, which is headroom, and a priority request takes it.
    floor.end(priority.pop())
    priority.append(floor.place(P))
    # Now it is the turn of one who starves, with the same slot; then of priority again.
    assert floor.end(priority.pop()) == [starving[0]]
    floor.end(priority.pop())
    priority.append(floor.place(P))
    assert floor.end(priority.pop()) == []


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
    )
    def arrives(self, tier, tenant, tokens, route, prefix, fail_fast, sequences):
        floor = self.floor
        self.call(floor.scheduler.tick(floor.now))
        request = QueuedRequest(tier, tenant, tokens, route, prefix, fail_fast, sequences)
        room = usable(floor, request)
        called = floor.scheduler.arrive(request, floor.now)
        if room and request.tier is tier:
            assert request.state is PLACED and request.replica_id in room
        if request.state is SHED and floor.now >= floor.gives_up_at:
            assert request.shed is ShedReason.NOT_OFFERED
        elif request.state is SHED:
            assert fail_fast or request.shed is ShedReason.QUEUE_FULL
        assert request.state is not WAITING or not fail_fast
        self.requests.append(request)
        self.settle(request, called)

    @rule(offered=st.sampled_from([True, True, False]))
    def nodes_change(self, offered):
        floor = self.floor
        if offered:
            floor.scheduler.offer()
            floor.gives_up_at = math.inf
        else:
            floor.scheduler.withdraw(floor.now)
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
    @rule(data=st.data())
    def loses_its_replica(self, data):
        request, floor = data.draw(st.sampled_from(self.placed)), self.floor
        self.call(floor.scheduler.tick(floor.now))
        if request not in self.placed:
            return
        self.placed.remove(request)
        if request.replica_id in floor.offers:
            floor.suspended[request.replica_id] = floor.now + SUSPENSION_S
        called = floor.scheduler.lost(request, floor.now)
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
    def bounds_hold(self):
        limits = {P: (8, 20), D: (6, 20), F: (4, 30)}
        for tier, (most, longest) in limits.items():
            mine = [t for t in self.waiting if t.tier.rank >= tier.rank and not t.replayed]
            assert len(mine) <= most
            assert all(self.floor.now - t.since < longest for t in self.waiting if t.tier is tier)
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


def shed_by(floor):
    request, _ = floor.arrive(fail_fast=True)
    assert request.state is SHED
    return request.retry_after_s


def test_who_is_turned_away_by_a_sleeping_model_is_told_when_it_will_be_awake():
    floor = Floor(min_retry_after_s=1.0, max_retry_after_s=60.0)
    waiting, _ = floor.arrive()
    assert waiting.state is WAITING
    floor.scheduler.sleep(20.0, None)
    floor.now = 5.0
    assert shed_by(floor) == 20.0, "it has not begun to start"
    floor.scheduler.sleep(20.0, 5.0)
    floor.now = 12.0
    assert shed_by(floor) == 13.0
    floor.now = 100.0
    assert shed_by(floor) == 2.0, "it takes longer than the last time"
    floor.scheduler.sleep(5.0, 5.0)
    assert shed_by(floor) == 1.0
    for start_s in (None, 600.0):
        floor.scheduler.sleep(start_s, None)
        assert shed_by(floor) == 60.0
    floor.scheduler.wake()
    assert floor.add("one", 1) == [waiting] and waiting.state is PLACED


def preempting(**more):
    floor = Floor(**more)
    floor.add("one", 4, slots=4, preempts=True)
    floor.grant(headroom=0)
    return floor


def test_where_the_engine_preempts_each_tier_takes_what_those_below_it_run_on():
    floor = preempting()
    flex = [floor.place(F) for _ in range(4)]
    assert floor.wait(F).tier is F
    defaults = [floor.place(D) for _ in range(4)]
    floor.wait(D)
    priority = [floor.place(P) for _ in range(4)]
    last = floor.wait(P)
    table = floor.scheduler.credits.slot_table
    assert table["one"].taken == [4, 4, 4]
    assert floor.end(priority[0]) == [last]
    # Nothing new of a tier is placed over its own that are suspended.
    assert floor.end(flex[0]) == floor.end(defaults[0]) == []


def test_idle_slots_come_before_those_of_lower_tiers():
    floor = preempting()
    floor.place(F)
    floor.add("two", 4, slots=4, preempts=True)
    assert {floor.place(P).replica_id for _ in range(7)} == {"one", "two"}
    assert floor.scheduler.credits.slot_table.free == 0
    assert floor.place(P).replica_id == "one", "only flex gives way there"


def test_flex_gives_way_before_default():
    floor = preempting()
    floor.add("two", 4, slots=4, preempts=True)
    while floor.arrive(D)[0].replica_id != "":
        pass
    floor.offers["three"] = Offer("three", "pool", 4, EVERYWHERE, preempts=True)
    floor.set_replicas()
    floor.grant({"three": 4})
    table = floor.scheduler.credits.slot_table
    assert table["three"].running == 1, "the one that waited"
    for _ in range(3):
        floor.place(F)
    for _ in range(3):
        assert floor.place(P).replica_id == "three"


def test_on_a_route_where_the_engine_has_no_tiers_nothing_is_preempted():
    floor = Floor()
    floor.add("one", 2, slots=2, routes={CHAT}, preempts=True)
    floor.grant(headroom=0)
    floor.place(F)
    floor.place(F)
    floor.wait(D, route=EMBED)
    floor.place(D, route=CHAT)


def test_priority_keeps_to_its_limit_where_the_model_sets_one():
    floor = preempting()
    for _ in range(4):
        floor.place(F)
    floor.grant(headroom=0, limits={"one": 2})
    first = [floor.place(P) for _ in range(2)]
    waiting = floor.wait(P)
    assert floor.end(first[0]) == [waiting]
    waiting = floor.wait(P)
    assert floor.grant(headroom=0) == [waiting], "without a limit it may take all slots"


def test_a_new_ingress_has_only_its_credits_for_priority():
    floor = Floor()
    floor.add("one", 1, slots=4, preempts=True)
    floor.place(P)
    floor.wait(P)


def test_headroom_that_an_operator_sets_is_kept_where_the_engine_preempts_too():
    floor = preempting(headroom=0.25)
    floor.grant(headroom=1)
    for _ in range(3):
        floor.place(D)
    floor.wait(D)
    floor.place(P)


def test_a_large_request_keeps_what_comes_free_from_its_own_tier_and_below():
    floor = Floor(headroom=0.0)
    floor.add("one", 3, slots=3)
    small = [floor.place(D), floor.place(D), floor.place(F)]
    large = floor.wait(D, sequences=2)
    flex = floor.wait(F)
    assert floor.end(small[2]) == []
    later, _ = floor.arrive(D)
    assert later.state is WAITING
    assert floor.end(small[0]) == [large] and large.slots == 2
    assert floor.end(small[1]) == [later]
    assert floor.end(large) == [flex]


def test_a_large_request_does_not_keep_better_tiers_out():
    floor = Floor(headroom=0.0)
    floor.add("one", 2, slots=2)
    small = [floor.place(D), floor.place(D)]
    large = floor.wait(D, sequences=2)
    floor.end(small[0])
    priority = floor.place(P)
    assert floor.end(small[1]) == []
    assert floor.end(priority) == [large]


def test_what_is_gathered_is_for_others_when_the_large_request_leaves():
    floor = Floor(headroom=0.0)
    floor.add("one", 2, slots=2)
    small = floor.place(D)
    floor.place(D)
    large, other = floor.wait(D, sequences=2), floor.wait(D)
    assert floor.end(small) == []
    assert floor.end(large) == [other]


def test_a_large_request_that_starves_keeps_better_tiers_out_in_its_turn():
    floor = Floor(starvation_every=2, flex={"starvation_age_s": 5}, headroom=0.0)
    floor.add("one", 2, slots=2)
    priority = [floor.place(P), floor.place(P)]
    large = floor.wait(F, sequences=2)
    floor.now = 5.0
    floor.grant()
    waiting = [floor.wait(P) for _ in range(3)]
    # One priority request goes first; then it is the large one's turn.
    assert floor.end(priority[0]) == [waiting[0]]
    assert floor.end(priority[1]) == []
    assert floor.end(waiting[0]) == [large]
    # It has had the turns of two.
    assert floor.end(large) == waiting[1:]


def test_the_demand_tells_where_slots_are_gathered():
    floor = Floor()
    floor.add("one", 4, slots=4)
    floor.grant(headroom=1)
    for _ in range(3):
        floor.place(D)
    assert floor.demand().gathers is None
    floor.wait(F, sequences=9)
    demand = floor.demand()
    assert demand.gathers == Gathers("one", 3 + 1, F, alone=False), "headroom has to stay free"
    assert demand.waiting[F] == 3
