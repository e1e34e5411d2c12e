import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.traffic import Histogram
from app.observe.catalogue import Kind, Metric, Source
from app.observe.exporter import MOST_VALUES, OTHER, Exporter, Sample
from tests.support.metrics import MemoryMetrics

pytestmark = pytest.mark.unit

BOUNDS = (0.1, 1.0, 10.0)
COUNTER = Metric("c_total", Kind.COUNTER, ("model",), Source.INGRESS, "")
GAUGE = Metric("g", Kind.GAUGE, ("model",), Source.INGRESS, "")
OLDEST = Metric("o", Kind.GAUGE, ("model",), Source.INGRESS, "", joined="max")
HISTOGRAM = Metric("h", Kind.HISTOGRAM, ("model",), Source.INGRESS, "", BOUNDS)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def exporter(samples, interval_s=10.0):
    backend, clock = MemoryMetrics(interval_s), Clock()
    return Exporter(lambda: samples, backend, clock), backend, clock


async def test_a_counter_is_there_with_0_and_then_grows_by_what_was_added():
    samples = [Sample(COUNTER, ("m",), 0)]
    made, backend, _ = exporter(samples)
    await made.push()
    assert backend.of("c_total", model="m") == 0
    for total in (3, 3, 7.5):
        samples[:] = [Sample(COUNTER, ("m",), total)]
        await made.push()
        assert backend.of("c_total", model="m") == total
    assert backend.calls["c_total"] == 3


async def test_a_total_that_starts_anew_is_added_to_what_was():
    samples = [Sample(COUNTER, ("m",), 5)]
    made, backend, _ = exporter(samples)
    await made.push()
    samples[:] = [Sample(COUNTER, ("m",), 2)]
    await made.push()
    assert backend.of("c_total", model="m") == 7


@pytest.mark.parametrize("interval_s", [1.0, 10.0, 60.0])
async def test_an_unchanged_gauge_is_set_again_before_each_of_rays_exports(interval_s):
    """Ray forgets a gauge once it has exported it: one that is set once vanishes."""
    made, backend, clock = exporter([Sample(GAUGE, ("m",), 1.0)], interval_s)
    begin = clock.now
    while clock.now < begin + 4 * interval_s:
        before, exported_at = backend.calls["g"], clock.now + interval_s
        while clock.now < exported_at:
            await made.push()
            clock.now += 1.0
        assert backend.calls["g"] > before
    assert backend.calls["g"] <= max(2 * 4, 4 * interval_s / 1.0)


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 100), max_size=50))
def test_a_histogram_has_prometheus_buckets_and_the_exact_sum(early, late):
    histogram = Histogram(BOUNDS)
    made, backend, _ = exporter([Sample(HISTOGRAM, ("m",), histogram)])
    for values in (early, late):
        for value in values:
            histogram.add(value)
        asyncio.run(made.push())
    values = early + late
    for le in (*BOUNDS, math.inf):
        text = "+Inf" if le == math.inf else str(le)
        assert backend.of("h_bucket", model="m", le=text) == sum(one <= le for one in values)
    assert backend.of("h_count", model="m") == len(values)
    assert backend.of("h_sum", model="m") == pytest.approx(sum(values))


@given(st.integers(1, 3 * MOST_VALUES))
def test_a_label_has_a_bounded_number_of_values_and_nothing_is_lost(models):
    one_each = Histogram(BOUNDS)
    one_each.add(0.5)
    labels = [(f"model-{n}",) for n in range(models)]
    samples = [Sample(metric, one, 2) for one in labels for metric in (COUNTER, GAUGE)]
    samples += [Sample(OLDEST, one, n) for n, one in enumerate(labels)]
    samples += [Sample(HISTOGRAM, one, one_each) for one in labels]
    made, backend, _ = exporter(samples)
    asyncio.run(made.push())
    asyncio.run(made.push())
    for name in ("c_total", "g", "o", "h_count"):
        series = backend.series(name)
        assert len(series) <= MOST_VALUES + 1
        if name != "o":
            assert sum(series.values()) == models * (1 if name == "h_count" else 2)
    if models > MOST_VALUES:
        assert backend.of("o", model=OTHER) == models - 1
        assert backend.of("h_bucket", model=OTHER, le="1.0") == models - MOST_VALUES


async def test_requests_have_their_turn_while_much_is_pushed():
    samples = [Sample(HISTOGRAM, (f"{n}",), Histogram(BOUNDS)) for n in range(90)]
    made, _, _ = exporter(samples)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    await made.push()
    other.cancel()
    assert turns >= 90 * 6 / 200
