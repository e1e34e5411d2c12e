"""Samples that every process has: failures of its background work, and its alarms."""

from __future__ import annotations

from collections.abc import Iterator

from app import alarms, supervision
from app.observe.catalogue import ALARMS, FAILURES, RESTARTS
from app.observe.exporter import Sample


def process_samples(
    failures: supervision.Registry = supervision.PROCESS, raised: alarms.Alarms = alarms.PROCESS
) -> Iterator[Sample]:
    """Yield what has failed in this process and what it was alarmed of.

    Work that has started but never failed is there with 0, so that a first failure is an increase.
    """
    counts = failures.failures()
    for name in sorted(failures.names()):
        failed = counts.get(name)
        yield Sample(FAILURES, (name,), failed.count if failed else 0)
        yield Sample(RESTARTS, (name,), failed.restarts if failed else 0)
    for name, count in (dict.fromkeys(alarms.NAMES, 0) | raised.counts()).items():
        yield Sample(ALARMS, (name,), count)
