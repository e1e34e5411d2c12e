"""Which request is placed, where and when."""

import pytest

from app.core.tiers import PriorityMode
from app.flow.request import QueuedRequest
from app.flow.slots import Offer
from tests.support.floor import CHAT, EMBED, ENDED, EVERYWHERE, NEW, SHED, WAITING, D, F, Floor, P

pytestmark = pytest.mark.unit


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
