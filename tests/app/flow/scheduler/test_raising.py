"""Requests that have not started in time are raised to a better tier."""

import math

import pytest

from app.config.queue import QueueSettings
from app.core.shed_reason import ShedReason
from app.flow.queue import RequestQueue
from app.flow.request import QueuedRequest
from tests.support.floor import CHAT, PLACED, SHED, WAITING, D, F, Floor, P

pytestmark = pytest.mark.unit


class OneSlot(Floor):
    """A replica with one slot, which is taken."""

    def __init__(self, tier=D):
        super().__init__(starvation_every=2)
        self.add("r", 1, slots=1)
        self.grant(headroom=0)
        self.running = self.place(tier)


@pytest.fixture
def floor():
    return OneSlot()


def pass_time(floor, seconds):
    """Let time pass, and keep the credits in force."""
    floor.now += seconds
    return floor.scheduler.tick(floor.now) + floor.grant()


def in_order(floor):
    """End what runs until nothing waits; return what was placed, in order."""
    placed, running = [], floor.running
    while called := floor.end(running):
        [running] = called
        placed.append(running)
    return placed


def test_a_flex_request_goes_before_flex_and_in_the_order_of_its_arrival(floor):
    floor.grant()
    slow = floor.wait(F)
    raised = floor.wait(F, start_within_s=1.0)
    pass_time(floor, 0.5)
    default = floor.wait(D)
    assert floor.scheduler.next_tick() == 1.0
    assert pass_time(floor, 0.5) == []
    assert (raised.tier, raised.raised_from, raised.state) == (D, F, WAITING)
    assert (raised.since, raised.arrived, slow.tier) == (0.0, 0.0, F)
    assert in_order(floor) == [raised, default, slow]


def test_what_it_holds_and_wants_is_of_its_new_tier(floor):
    request = floor.wait(F, start_within_s=1.0, raise_to=P)
    before = floor.demand()
    assert (before.waiting, before.oldest_s[F]) == ({P: 0, D: 0, F: 1}, 0.0)
    pass_time(floor, 1.0)
    after = floor.demand()
    assert after.waiting == {P: 1, D: 0, F: 0}
    assert (after.oldest_s[P], after.oldest_s[F]) == (1.0, 0)
    # Priority waits without a credit: the Model is asked at once.
    assert floor.scheduler.renewal_at() < floor.now + 0.1
    assert floor.end(floor.running) == [request]
    assert floor.scheduler.credits.running == {P: 1, D: 0, F: 0}
    floor.end(request)
    assert floor.scheduler.credits.running == {P: 0, D: 0, F: 0}


def test_one_that_is_raised_to_priority_may_take_what_is_kept_for_priority():
    floor = Floor()
    floor.add("r", 2, slots=2)
    floor.grant(headroom=1)
    floor.place(D)
    request = floor.wait(F, start_within_s=1.0, raise_to=P)
    assert pass_time(floor, 1.0) == [request]
    assert (request.state, request.tier, request.placed) == (PLACED, P, 1.0)


def test_without_an_engine_that_honours_priority_it_becomes_default_or_stays():
    floor = Floor()
    floor.add("r", 1, slots=1, routes=())
    floor.place(D)
    either = floor.wait(F, start_within_s=1.0, raise_to=P)
    only = floor.wait(F, start_within_s=1.0, raise_to=P, raise_only=True)
    default = floor.wait(D, start_within_s=1.0, raise_to=P)
    pass_time(floor, 1.0)
    assert [(one.tier, one.raised_from) for one in (either, only, default)] == [
        (D, F), (F, None), (D, None),
    ]  # fmt: skip
    # It is no reason to look again and again.
    assert floor.scheduler.next_tick() > 100
    floor.add("honours", 0)
    assert [one.tier for one in (either, only, default)] == [D, P, P]


def test_it_is_not_shed_because_it_was_raised(floor):
    """A default request is shed after two minutes, a flex request after ten."""
    raised = floor.wait(F, start_within_s=300.0)
    default = floor.wait(D)
    assert pass_time(floor, 120.0) == [default]
    pass_time(floor, 180.0)
    assert (raised.state, raised.tier) == (WAITING, D)
    assert floor.scheduler.next_tick() == 600.0
    assert pass_time(floor, 300.0) == [raised]
    assert (raised.state, raised.shed) == (SHED, ShedReason.WAITED_TOO_LONG)


def test_it_starves_by_the_time_since_its_arrival():
    floor = OneSlot(P)
    raised = floor.wait(F, start_within_s=20.0)
    pass_time(floor, 29.0)
    first, second = floor.wait(P), floor.wait(P)
    pass_time(floor, 1.0)
    assert floor.demand().starving == 1
    assert in_order(floor) == [first, raised, second]


def test_a_replay_has_started_and_is_not_raised(floor):
    floor.add("other", 1, slots=1)
    floor.place(D)
    floor.end(floor.running)
    request = floor.place(F, start_within_s=1.0)
    blocking = floor.wait(P)
    floor.scheduler.lost(request, floor.now)
    assert blocking.state is WAITING and request.state is WAITING
    pass_time(floor, 1.5)
    assert (request.tier, request.raised_from) == (F, None)


def test_a_raised_request_that_is_replayed_keeps_its_new_tier(floor):
    floor.add("other", 1, slots=1)
    other = floor.place(D)
    request = floor.wait(F, start_within_s=1.0)
    pass_time(floor, 1.0)
    assert floor.end(floor.running) == [request]
    floor.scheduler.lost(request, floor.now)
    assert (request.state, request.tier, request.raised_from) == (WAITING, D, F)
    assert floor.end(other) == [request]


def test_one_that_takes_several_slots_gathers_them_at_its_new_tier():
    floor = Floor()
    floor.add("r", 4, slots=4)
    floor.grant(headroom=0)
    running = [floor.place(D) for _ in range(4)]
    large = floor.wait(F, sequences=3, start_within_s=1.0)
    floor.end(running[0])
    # Default goes before flex that gathers.
    running[0] = floor.place(D)
    pass_time(floor, 1.0)
    floor.end(running[0])
    later = floor.wait(D)
    floor.end(running[1])
    assert floor.end(running[2]) == [large]
    assert (large.slots, large.tier) == (3, D)
    assert floor.end(running[3]) == [later]


def test_where_the_queue_is_full_it_stays_in_its_reserved_place():
    places = {"max_waiting": 2, "reserved": 1}
    made = RequestQueue(
        QueueSettings.load(dict.fromkeys(("priority", "default", "flex"), places), "")
    )
    made.configure(made.settings, slots=0, ingresses=1)

    def join(tier, **more):
        request = QueuedRequest(tier, "a", 1, CHAT, **more)
        assert made.join(request, 0.0) is None
        return request

    def rise(now):
        return made.raise_due(now, lambda request: request.raise_to, lambda request: 1)

    join(P), join(P)
    default, flex = join(D), join(F, start_within_s=1.0)
    assert made.next_raise() == 1.0
    assert not rise(1.0) and flex.tier is F
    # The place of a default request is free: a new one would be let in, too.
    made.leave(default)
    assert rise(1.1) and flex.tier is D
    assert made.next_raise() == math.inf
    assert (made.waiting(P), made.waiting(D), made.waiting(F), made.count) == (2, 1, 0, 3)
    another = join(F, start_within_s=1.0)
    assert not rise(2.0) and another.tier is F
