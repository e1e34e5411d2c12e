"""How long replicas take from when they are ordered."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.scaling.starts import Starts

pytestmark = pytest.mark.unit


def took(*notes):
    starts = Starts()
    for now, target, ready in notes:
        starts.note(now, target, ready)
    return starts.took_s


def test_a_start_counts_from_the_decision_until_the_replica_is_ready():
    assert took((0, 1, 1), (10, 2, 1), (300, 2, 1)) == 0
    assert took((0, 1, 1), (10, 2, 1), (400, 2, 2)) == 390
    # What was ordered first is ready first.
    assert took((0, 1, 1), (10, 2, 1), (20, 3, 1), (100, 3, 2)) == 90
    assert took((0, 1, 1), (10, 2, 1), (20, 3, 1), (100, 3, 2), (200, 3, 3)) == 180


def test_what_was_ordered_before_anybody_looked_is_not_known():
    assert took((0, 2, 0), (50, 2, 2)) == 0
    assert took((0, 2, 0), (10, 3, 0), (50, 3, 2), (60, 3, 3)) == 50


def test_one_that_is_not_wanted_any_more_is_the_last_ordered():
    assert took((0, 1, 1), (10, 2, 1), (20, 3, 1), (30, 2, 1), (110, 2, 2)) == 100
    assert took((0, 3, 3), (10, 2, 3), (20, 2, 2), (30, 2, 2)) == 0


def test_one_that_failed_is_ordered_anew_when_it_is_missed():
    assert took((0, 2, 2), (10, 2, 1), (70, 2, 2)) == 60
    # A rolling update starts one more than there are to be, and that is not counted.
    assert took((0, 2, 2), (10, 2, 3), (20, 2, 2)) == 0


def test_a_single_slow_start_does_not_count_for_long_and_a_cluster_that_grows_does():
    starts, now = Starts(), 0.0
    starts.note(now, 0, 0)
    for start_s in [30.0] * 8 + [3600.0]:
        starts.note(now, 1, 0)
        now += start_s
        starts.note(now, 1, 1)
        starts.note(now, 0, 0)
    assert starts.took_s == 30
    starts.note(now, 20, 0)
    starts.note(now + 30, 20, 10)
    starts.note(now + 400, 20, 20)
    assert starts.took_s == 400


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 9), st.integers(0, 9)), max_size=60))
def test_no_start_takes_longer_than_anybody_has_looked(steps):
    starts, now = Starts(), 0.0
    for passed, target, ready in steps:
        now += passed
        starts.note(now, target, ready)
        assert 0 <= starts.took_s <= now
