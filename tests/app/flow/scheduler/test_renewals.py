"""When an ingress renews its credits, and what it does without a grant."""

import pytest

from app.flow.credits import QUIET_S, SILENCE_S
from tests.support.floor import WAITING, Floor, P

pytestmark = pytest.mark.unit


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
