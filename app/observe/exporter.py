"""Pushes samples of a process's state into Ray's exporter, once a second.

Requests never come here: they only change plain counts, which this task reads. A gauge or a bucket
that Ray has exported is forgotten by it, so unchanged ones are set again before each export.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from app.contracts.traffic import Histogram
from app.observe.catalogue import Kind, Metric
from app.ray_compat.metrics import MetricsBackend, RayMetrics, Record

EVERY_S: Final = 1.0
"""How often samples are taken, in seconds. Ray exports them every ten seconds by default."""
MOST_VALUES: Final = 100
"""How many values a label of one metric has in one process, at most."""
OTHER: Final = "other"
"""The label value that all further ones share."""
_SLICE: Final = 100
"""How many values are pushed before requests get their turn: half a millisecond."""


class Sample(NamedTuple):
    """The present value of one series.

    Attributes:
        metric: the metric.
        labels: the values of its labels.
        value: a counter's total since the process started, a gauge's value, or a histogram.
    """

    metric: Metric
    labels: tuple[str, ...]
    value: float | Histogram


class Exporter:
    """Exports what ``collect`` returns. ``run`` is to be kept running by ``app.supervision``."""

    def __init__(
        self,
        collect: Callable[[], Iterable[Sample]],
        backend: MetricsBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._collect = collect
        self._backend = backend or RayMetrics()
        self._clock = clock
        self._families: dict[str, _Family] = {}
        self._pushed = 0

    async def run(self) -> None:
        """Export once a second, for ever."""
        while True:
            await self.push()
            await asyncio.sleep(EVERY_S)

    async def push(self) -> None:
        """Export the present values, and let requests have their turn in between."""
        families = [self._family(metric) for metric in self._take()]
        now = self._clock()
        stale_before = now - self._backend.report_interval_s() / 2
        for family in families:
            for pushed in family.push(now, stale_before):
                self._pushed += pushed
                if self._pushed >= _SLICE:
                    self._pushed = 0
                    await asyncio.sleep(0)

    def _take(self) -> list[Metric]:
        """Take all samples at once, and return the metrics that have some."""
        metrics: dict[str, Metric] = {}
        for metric, labels, value in self._collect():
            metrics[metric.name] = metric
            self._family(metric).take(labels, value)
        return list(metrics.values())

    def _family(self, metric: Metric) -> _Family:
        family = self._families.get(metric.name)
        if family is None:
            family = self._families[metric.name] = _Family(metric, self._backend)
        return family


class _Series:
    """One series as Ray has it: its labels, the value pushed last and when."""

    __slots__ = ("at", "labels", "value")

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.value = math.nan
        self.at = -math.inf


class _Family:
    """One metric, and all its series."""

    def __init__(self, metric: Metric, backend: MetricsBackend) -> None:
        self._metric = metric
        self._known: tuple[set[str], ...] = tuple(set() for _ in metric.labels)
        self._series: dict[tuple[str, ...], _Series] = {}
        self._records = _records(metric, backend)
        # The samples of this round, by label values.
        self._values: dict[tuple[str, ...], float | Histogram] = {}
        self._now = self._stale_before = -math.inf

    def take(self, labels: tuple[str, ...], value: float | Histogram) -> None:
        """Take a sample; those that share the label value ``OTHER`` are combined."""
        assert len(labels) == len(self._known), self._metric.name
        bounded = tuple(map(_bounded, self._known, labels))
        before = self._values.get(bounded)
        self._values[bounded] = value if before is None else self._join(before, value)

    def _join(self, one: float | Histogram, two: float | Histogram) -> float | Histogram:
        if isinstance(one, Histogram) and isinstance(two, Histogram):
            joined = one.copy()
            joined.join(two)
            return joined
        assert isinstance(one, int | float) and isinstance(two, int | float)
        return max(one, two) if self._metric.joined == "max" else one + two

    def push(self, now: float, stale_before: float) -> Iterator[int]:
        """Push what was taken, series by series; yields how many values were set.

        Counters are set if they have grown, gauges if they have changed or were set last before
        ``stale_before``.
        """
        self._now, self._stale_before = now, stale_before
        values, self._values = self._values, {}
        for labels, value in values.items():
            if isinstance(value, Histogram):
                yield self._push_histogram(labels, value)
            elif self._metric.kind is Kind.COUNTER:
                yield self._push_counter(labels, value)
            else:
                yield self._push_gauge(self._records[0], "", labels, value)

    def _push_histogram(self, labels: tuple[str, ...], value: Histogram) -> int:
        buckets, sums, counts = self._records
        pushed = seen = 0
        for bound, count in zip((*value.bounds, math.inf), value.counts, strict=True):
            seen += count
            le = "+Inf" if bound == math.inf else repr(float(bound))
            pushed += self._push_gauge(buckets, le, labels, seen)
        pushed += self._push_gauge(sums, "sum", labels, value.total)
        return pushed + self._push_gauge(counts, "count", labels, seen)

    def _push_counter(self, labels: tuple[str, ...], value: float) -> int:
        series = self._of(labels)
        before = 0.0 if math.isnan(series.value) else series.value
        # A total that has fallen was counted anew from 0, by another object of this process.
        added = value - before if value >= before else value
        if added or math.isnan(series.value):
            series.value = value
            self._records[0](added, series.labels)
            return 1
        return 0

    def _push_gauge(self, record: Record, part: str, labels: tuple[str, ...], value: float) -> int:
        series = self._of(labels, part)
        if value == series.value and series.at > self._stale_before:
            return 0
        series.value, series.at = value, self._now
        record(value, series.labels)
        return 1

    def _of(self, labels: tuple[str, ...], part: str = "") -> _Series:
        """Return a series; ``part`` is a histogram's bound, its ``sum`` or its ``count``."""
        key = (part, *labels)
        series = self._series.get(key)
        if series is None:
            tags = dict(zip(self._metric.labels, labels, strict=True))
            if part not in ("", "sum", "count"):
                tags["le"] = part
            series = self._series[key] = _Series(tags)
        return series


def _bounded(known: set[str], value: str) -> str:
    if value not in known:
        if len(known) >= MOST_VALUES:
            return OTHER
        known.add(value)
    return value


def _records(metric: Metric, backend: MetricsBackend) -> tuple[Record, ...]:
    name, text, labels = metric.name, metric.text, metric.labels
    if metric.kind is Kind.COUNTER:
        return (backend.counter(name, text, labels),)
    if metric.kind is Kind.GAUGE:
        return (backend.gauge(name, text, labels),)
    # Gauges that hold running totals: Prometheus computes the same rates and quantiles of them,
    # and unlike Ray's histogram they keep the exact sum, start at 0 and cost nothing per request.
    return (
        backend.gauge(f"{name}_bucket", text, (*labels, "le")),
        backend.gauge(f"{name}_sum", text, labels),
        backend.gauge(f"{name}_count", text, labels),
    )
