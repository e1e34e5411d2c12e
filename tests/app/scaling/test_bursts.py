"""The slots that bursts of the last minutes need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.scaling.bursts import mean_wait_s, slots_for

pytestmark = pytest.mark.unit

LOADS = st.lists(st.floats(0, 500), min_size=1, max_size=40)
STEP_S = 15.0


def needed(loads, late_s=90.0, wait_s=30.0, before=0):
    return slots_for(loads, bin_s=STEP_S, late_s=late_s, wait_s=wait_s, before=before)


def waits(loads, slots, late_s=90.0, wait_s=30.0):
    late = int(-(-late_s // STEP_S))
    return mean_wait_s(loads, slots, bin_s=STEP_S, late=late, within_s=wait_s + late_s)


def test_a_steady_load_needs_nothing_as_the_fleet_follows_it():
    assert needed([40.0] * 46, before=6) == 0


def test_a_burst_shorter_than_a_start_needs_slots_that_are_there():
    loads = [1.0] * 20 + [200.0] * 4 + [1.0] * 22
    slots = needed(loads, before=6)
    assert 60 < slots < 200, "fewer than its peak, because default may wait"
    assert needed(loads, late_s=15.0, before=1) < slots / 2


def test_a_longer_wait_needs_fewer_slots():
    loads = [1.0] * 20 + [200.0] * 4 + [1.0] * 22
    found = [needed(loads, wait_s=wait_s, before=6) for wait_s in (0.0, 10.0, 30.0, 60.0)]
    assert found[0] == 200
    assert found == sorted(found, reverse=True) and len(set(found)) == 4


@given(LOADS, st.integers(0, 500))
def test_more_slots_never_let_anybody_wait_longer(loads, slots):
    assert waits(loads, slots + 1) <= waits(loads, slots) + 1e-6


@given(LOADS, st.floats(1, 600), st.floats(0.1, 120))
def test_so_many_are_enough_and_one_fewer_is_not(loads, late_s, wait_s):
    slots = needed(loads, late_s, wait_s)
    assert 0 <= slots <= max(loads) + 1
    assert waits(loads, slots, late_s, wait_s) <= wait_s
    assert not slots or waits(loads, slots - 1, late_s, wait_s) > wait_s


def test_nobody_asks_for_nothing():
    assert needed([0.0] * 10) == needed([]) == 0
