"""Metrics through Ray's own exporter, for values that were aggregated in this process.

Ray's public API has no call for three things that Frontline needs: a counter that starts at 0
(``Counter.inc`` refuses 0), counts of a histogram's buckets (``Histogram.observe`` takes one value,
and Ray's agent replaces each by the middle of its bucket), and the interval of reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, cast

import ray
from ray.serve import metrics

Record = Callable[[float, Mapping[str, str]], None]
"""Adds a value to a counter, or sets a gauge, of the series with these labels."""

_FASTEST_S: Final = 1.0


class MetricsBackend(Protocol):
    """Where metrics are exported to."""

    def counter(self, name: str, text: str, labels: tuple[str, ...]) -> Record:
        """Create a counter; the returned function adds to it, also 0."""
        ...

    def gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Record:
        """Create a gauge; the returned function sets it."""
        ...

    def report_interval_s(self) -> float:
        """Return how often values are exported. A gauge that is not set in between vanishes."""
        ...


class RayMetrics:
    """Ray's exporter. In a replica, Serve adds ``application``, ``deployment`` and ``replica``."""

    def counter(self, name: str, text: str, labels: tuple[str, ...]) -> Record:
        """Create a counter; the returned function adds to it, also 0."""
        # Serve's annotation says one label.
        return _record(metrics.Counter(name, text, cast(Any, labels)))

    def gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Record:
        """Create a gauge; the returned function sets it."""
        return _record(metrics.Gauge(name, text, cast(Any, labels)))

    def report_interval_s(self) -> float:
        """Return how often this process reports its metrics to its node's agent, in seconds."""
        interval_ms: int = ray._config.metrics_report_interval_ms()
        return max(_FASTEST_S, interval_ms / 1000)


def _record(metric: Any) -> Record:
    # Not `inc`, which refuses 0: a counter has to be there before its first event, or Prometheus
    # does not see that event as an increase.
    record: Record = metric._record
    return record
