"""How much longer requests take in a full fleet, learnt from what a fleet reports."""

import pytest
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from app.scaling.batch import FullBatch

pytestmark = pytest.mark.unit

SLOTS = 64.0


def learnt(growth, used, *, idle_s=5.0, each_s=300.0):
    """A fleet that was used so much for some time each, where a full one takes 1 + growth times."""
    full, now, finished, served_s = FullBatch(600.0), 0.0, 0.0, 0.0
    for share in used:
        service_s = idle_s * (1 + growth * share)
        for _ in range(int(each_s)):
            now += 1.0
            finished += share * SLOTS / service_s
            served_s += share * SLOTS
            full.note(now, running=share * SLOTS, slots=SLOTS, finished=finished, served_s=served_s)
    return full, now


@trying(max_examples=30)
@given(st.floats(0.5, 10), st.floats(0.1, 0.8))
def test_the_slope_is_learnt_from_a_load_that_changes(growth, last):
    full, now = learnt(growth, (0.9, 0.3, 0.7, 0.1, 0.8, last, last))
    expected = (1 + 0.9 * growth) / (1 + last * growth)
    assert full.slower(now, 600.0) == pytest.approx(expected, rel=0.25)


def test_requests_that_always_take_as_long_are_learnt_too():
    full, now = learnt(0.0, (0.9, 0.3, 0.7, 0.1, 0.8, 0.3, 0.3))
    assert full.slower(now, 600.0) == pytest.approx(1.0, abs=0.12)


def test_unless_measured_a_full_fleet_is_somewhat_slower():
    full, now = learnt(0.0, (0.2,), each_s=20.0)
    assert full.slower(now, 600.0) == pytest.approx(2.8 / 1.4)
    assert FullBatch(600.0).slower(5.0, 600.0) == 1.0


def test_a_full_fleet_changes_nothing():
    full, now = learnt(3.0, (0.2, 0.6, 0.95, 0.95))
    assert full.slower(now, 300.0) == 1.0


def test_a_fleet_that_fills_up_tells_nothing():
    """The first that end are short ones, which is not because the fleet is empty."""
    full, now, finished, served_s = FullBatch(600.0), 0.0, 0.0, 0.0
    for second in range(40):
        now += 1.0
        running = min(SLOTS, 2.0 * second)
        finished += 0.02 * running
        served_s += 0.02 * running * second
        full.note(now, running=running, slots=SLOTS, finished=finished, served_s=served_s)
    fresh, then = learnt(0.0, (0.6,), each_s=20.0)
    assert full.slower(now, 600.0) == pytest.approx(fresh.slower(then, 600.0), rel=0.1)


@trying(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0, 500), st.floats(0, 100), st.floats(0, 200), st.floats(0, 1000)),
        max_size=60,
    )
)
def test_whatever_is_reported_it_is_a_number_from_one_up(steps):
    full, now = FullBatch(600.0), 0.0
    for passed, running, finished, served_s in steps:
        now += passed
        full.note(now, running=running, slots=50.0, finished=finished, served_s=served_s)
        assert 1.0 <= full.slower(now, 600.0) < 1e6
