"""Requests that take several slots of one replica."""

import pytest

from app.contracts.credits import Gathers
from tests.support.floor import PLACED, WAITING, D, F, Floor, P

pytestmark = pytest.mark.unit


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


def test_slots_are_no_longer_gathered_on_a_replica_that_is_gone():
    floor = Floor(headroom=0.0)
    floor.add("one", 1, slots=1)
    lost = floor.place(F)
    floor.add("big", 1, slots=2)
    large = floor.wait(D, sequences=2)
    # It waits, too: what is free is on the replica that lost it, or gathered.
    assert floor.scheduler.lost(lost, floor.now, suspend=False) == []
    floor.add("other", 0, slots=2)
    assert floor.demand().gathers.replica_id == "big"
    del floor.offers["big"]
    assert floor.set_replicas() == []
    assert floor.demand().gathers.replica_id == "other"
    assert floor.grant({"other": 2}) == [large] and lost.state is WAITING


def test_a_replay_that_goes_before_a_large_request_is_no_other_request_that_has_changed():
    floor = Floor(headroom=0.0)
    floor.add("one", 1, slots=1)
    lost = floor.place(D)
    floor.add("big", 1, slots=2)
    floor.wait(D, sequences=2)
    assert floor.scheduler.lost(lost, floor.now, suspend=False) == []
    assert (lost.state, lost.replica_id) == (PLACED, "big")


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
