"""Placing on replicas whose engine preempts."""

import pytest

from app.flow.slots import Offer
from tests.support.floor import CHAT, EMBED, EVERYWHERE, D, F, Floor, P

pytestmark = pytest.mark.unit


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
