"""Which request is shed, when and with which reason."""

import math

import pytest

from app.core.shed_reason import ShedReason
from app.flow.scheduler import GIVE_UP_S
from tests.support.floor import ENDED, PLACED, SHED, WAITING, D, F, Floor, P

pytestmark = pytest.mark.unit


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


def test_the_latest_reason_for_which_no_engine_is_expected_is_theirs():
    floor = Floor()
    waits = floor.wait()
    floor.scheduler.withdraw(0.0, ShedReason.NOT_OFFERED)
    floor.scheduler.withdraw(GIVE_UP_S / 2, ShedReason.ENGINE_FAILED)
    floor.now = GIVE_UP_S
    assert floor.scheduler.tick(floor.now) == [waits]
    assert waits.shed is ShedReason.ENGINE_FAILED
    assert floor.arrive(P)[0].shed is ShedReason.ENGINE_FAILED
    floor.scheduler.offer()
    floor.scheduler.withdraw(floor.now, ShedReason.NOT_OFFERED)
    assert floor.scheduler.next_tick() == math.inf
    floor.now += GIVE_UP_S
    assert floor.arrive(P)[0].shed is ShedReason.NOT_OFFERED


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
