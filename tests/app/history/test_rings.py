import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.tiers import Tier
from app.history.point import MOST_REPLICAS, Point, ReplicaPoint, TierPoint
from app.history.rings import COARSE, COARSE_S, SECONDS, History

pytestmark = pytest.mark.unit


def point(at, waiting=0, shed=0, replicas=None):
    tiers = {tier: TierPoint(waiting, float(waiting)) for tier in Tier}
    return Point(at, tiers, {"queue_full": shed} if shed else {}, {}, replicas or {})


def filled(points):
    history = History()
    for one in points:
        history.add(one)
    return history


# Clocks may be set back, or ahead.
@given(st.lists(st.floats(0, 1e6), max_size=700))
def test_it_is_bounded_whatever_the_clock_does(times):
    history = filled(map(point, times))
    rows = history.since(0)
    assert len(rows.fine) == min(len(times), SECONDS)
    assert len(rows.coarse) <= COARSE
    assert rows.number == len(times)


@given(st.integers(0, 900), st.lists(st.integers(1, 40), max_size=30))
def test_what_is_fetched_in_parts_is_what_is_fetched_at_once(start, parts):
    history = filled(point(float(at)) for at in range(start))
    fine, coarse, at = [], [], start
    seen = history.since(0).number
    for count in parts:
        for _ in range(count):
            history.add(point(float(at)))
            at += 1
        rows = history.since(seen)
        assert len(rows.fine) == count
        fine, coarse, seen = [*fine, *rows.fine], [*coarse, *rows.coarse], rows.number
    whole = history.since(0)
    if fine:
        assert fine[-SECONDS:] == list(whole.fine)[-len(fine) :]
    if coarse:
        assert list(whole.coarse)[-len(coarse) :] == coarse[-COARSE:]
    assert history.since(seen) == type(whole)(seen, (), ())


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), min_size=60, max_size=60))
def test_a_coarse_point_keeps_the_peaks_and_the_sums(values):
    history = filled(point(float(at), *value) for at, value in enumerate(values))
    step = int(COARSE_S)
    for number, row in enumerate(history.since(0).coarse):
        of = values[number * step : (number + 1) * step]
        at, tiers, sheds, _, _ = orjson.loads(row)
        assert at == (number + 1) * step - 1
        assert tiers[0][0] == max(waiting for waiting, _ in of)
        assert sheds.get("queue_full", 0) == sum(shed for _, shed in of)


def test_the_longest_rows_take_no_more_memory_than_is_stated():
    name = "model#sixteen-letters#12345678"
    replicas = {f"{name}{number}": ReplicaPoint(256, 0, 256) for number in range(MOST_REPLICAS)}
    row = orjson.dumps(point(1.7e9, 99999, 9, replicas).to_row())
    assert len(row) * (SECONDS + COARSE) < 1024 * 1024
