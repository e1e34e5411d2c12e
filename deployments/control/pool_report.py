"""What a Model reports to the autoscaling policy of one pool. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from app.config.model import PoolSettings
from app.contracts.status import ReplicaStatus
from app.core.tiers import PriorityMode
from app.scaling.report import PoolReport


def report_pool(
    pool: PoolSettings,
    mode: PriorityMode,
    ready: Sequence[ReplicaStatus],
    seen: ReplicaStatus | None,
) -> PoolReport:
    """Return the report of a pool.

    Args:
        pool: its settings.
        mode: when the model delivers priority.
        ready: the status of its replicas that are ready.
        seen: the status of one of them, or of one that was ready before; ``None`` if none ever was.
    """
    auto = mode is PriorityMode.AUTO and seen is not None
    return PoolReport(
        slots=_slots(pool, ready, seen),
        ready=len(ready),
        honours=float(seen.dialect.native_priority) if auto and seen else 1.0,
        cost=pool.cost_per_hour,
        start_s=seen.start_s if seen is not None else 0.0,
        preempts=float(seen.dialect.preempts) if auto and seen else 0.0,
    )


def _slots(pool: PoolSettings, ready: Sequence[ReplicaStatus], seen: ReplicaStatus | None) -> float:
    """Return how many slots a replica of a pool has, or would have.

    With ``slots: auto`` replicas can differ, and their mean counts. Before any replica was ready,
    it is the most: the first one tells, so one is started and not as many as few slots would need.
    """
    if isinstance(pool.slots, int):
        return pool.slots
    if ready:
        return fmean(status.slots for status in ready)
    return seen.slots if seen is not None else pool.most_slots
