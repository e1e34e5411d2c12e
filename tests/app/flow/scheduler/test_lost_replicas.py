"""Requests whose replica failed them or was lost."""

import pytest

from app.core.shed_reason import ShedReason
from app.flow.scheduler import SUSPENSION_S
from tests.support.floor import PLACED, SHED, WAITING, Floor, P

pytestmark = pytest.mark.unit


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


@pytest.mark.parametrize("others", [0, 1])
def test_the_slot_that_a_lost_request_leaves_is_for_those_who_wait(others):
    """264253e: it stayed free until the next event."""
    floor = Floor()
    floor.add("one", 1)
    request = floor.place()
    for number in range(others):
        floor.add(f"other-{number}", 1)
        floor.place()
    waiting = floor.wait()
    assert floor.scheduler.lost(request, floor.now, suspend=False) == [waiting]
    assert (waiting.state, waiting.replica_id) == (PLACED, "one")
    assert request.state is (WAITING if others else SHED)


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
