"""One point of a model's history: its queue, its engines and its traffic at one moment. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from app.contracts.stats import IngressBoard, Suspended
from app.contracts.status import ReplicaStatus
from app.contracts.traffic import Outcome, TierTraffic, Traffic
from app.core.tier_decision import downgrade_reason
from app.core.tiers import Tier

WINDOW_S: Final = 30.0
"""Quantiles and rates of a point are over the seconds before it. With fewer, a p99 of a few
requests a second means nothing; with more, the board lags behind what it shows."""
MOST_REPLICAS: Final = 32
"""How many replicas a point names; the others are summed up as one."""
OTHERS: Final = "others"
_SHED: Final = "shed"
_UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class TierPoint:
    """One tier, over all ingresses. Rates and quantiles are over ``WINDOW_S``.

    Attributes:
        waiting: slots that requests in the queue would take.
        oldest_s: how long the oldest of them has waited, in seconds; 0 if none waits.
        running: slots that its requests hold on engines, suspended ones included.
        suspended: how many of them engines have suspended.
        ttft_p50_s, ttft_p99_s: time to the first byte, in seconds, of streams; ``None`` without.
        usd_per_min: cost of requests that ended, in USD a minute.
        tokens_per_s: output tokens of requests that ended, a second.
        requests_per_s: requests that ended, a second.
    """

    waiting: int = 0
    oldest_s: float = 0.0
    running: int = 0
    suspended: int = 0
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    usd_per_min: float = 0.0
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaPoint:
    """Slots of one replica: running, suspended by its engine, and how many there are."""

    running: int
    suspended: int
    slots: int


@dataclass(frozen=True, slots=True)
class Point:
    """A model at one moment.

    Attributes:
        at: when, in Unix seconds.
        tiers: every tier.
        sheds: requests shed since the point before, by reason.
        downgrades: requests not served as requested since the point before, by reason
            (``downgrade_reason``).
        replicas: the replicas by name, at most ``MOST_REPLICAS`` and ``OTHERS``.
    """

    at: float
    tiers: Mapping[Tier, TierPoint]
    sheds: Mapping[str, int] = field(default_factory=dict)
    downgrades: Mapping[str, int] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaPoint] = field(default_factory=dict)

    def to_row(self) -> list[Any]:
        """Return it as JSON values; the page of the board reads them by position."""
        tiers = [
            [
                one.waiting, round(one.oldest_s, 3), one.running, one.suspended,
                _rounded(one.ttft_p50_s), _rounded(one.ttft_p99_s), _short(one.usd_per_min),
                _short(one.tokens_per_s), _short(one.requests_per_s),
            ]
            for one in (self.tiers[tier] for tier in Tier)
        ]  # fmt: skip
        replicas = {
            name: [one.running, one.suspended, one.slots] for name, one in self.replicas.items()
        }
        return [round(self.at, 3), tiers, dict(self.sheds), dict(self.downgrades), replicas]


def sheds_of(traffic: Traffic) -> Counter[str]:
    """Return how many requests were shed, by reason."""
    return _reasons(traffic, lambda one: (one.reason or _UNKNOWN) if one.state == _SHED else None)


def downgrades_of(traffic: Traffic) -> Counter[str]:
    """Return how many requests were not served as requested, by reason."""
    return _reasons(traffic, lambda one: downgrade_reason(one.requested, one.served, one.reason))


def _reasons(traffic: Traffic, reason_of: Callable[[Outcome], str | None]) -> Counter[str]:
    found: Counter[str] = Counter()
    for outcome, count in traffic.outcomes.items():
        if (reason := reason_of(outcome)) is not None:
            found[reason] += count
    return found


def queue_points(
    ingresses: Iterable[IngressBoard],
    suspended: Mapping[Tier, Suspended],
    recent: Traffic,
    window_s: float,
) -> dict[Tier, TierPoint]:
    """Return every tier, by the latest demands of all ingresses and the traffic in the window."""
    demands = [one.demand for one in ingresses]
    nothing = TierTraffic()
    points = {}
    for tier in Tier:
        traffic = recent.tiers.get(tier, nothing)
        span_s = window_s or float("inf")
        points[tier] = TierPoint(
            waiting=sum(demand.waiting[tier] for demand in demands),
            oldest_s=max((demand.oldest_s[tier] for demand in demands), default=0.0),
            running=sum(demand.running[tier] for demand in demands),
            suspended=suspended[tier].slots if tier in suspended else 0,
            ttft_p50_s=traffic.ttft.quantile(0.5),
            ttft_p99_s=traffic.ttft.quantile(0.99),
            usd_per_min=60 * float(traffic.cost) / span_s,
            tokens_per_s=traffic.completion_tokens / span_s,
            requests_per_s=traffic.duration.count / span_s,
        )
    return points


def replica_points(
    replicas: Iterable[ReplicaStatus], ingresses: Iterable[IngressBoard]
) -> dict[str, ReplicaPoint]:
    """Return the slots of every replica that is ready, and of those that finish their requests."""
    taken: Counter[str] = Counter()
    for one in ingresses:
        for name, (_, used) in one.demand.held.items():
            taken[name] += used
    ready = {status.replica_id: status for status in replicas}
    points = {name: _replica(taken[name], status) for name, status in sorted(ready.items())}
    # One that drains has no slots to give.
    for name in sorted(name for name, used in taken.items() if used and name not in ready):
        points[name] = ReplicaPoint(taken[name], 0, 0)
    return _bounded(points)


def _replica(taken: int, status: ReplicaStatus) -> ReplicaPoint:
    # Where an engine does not preempt, what exceeds its slots waits inside it, for a moment.
    suspended = max(0, taken - status.slots) if status.preempts else 0
    return ReplicaPoint(taken - suspended, suspended, status.slots)


def _bounded(points: dict[str, ReplicaPoint]) -> dict[str, ReplicaPoint]:
    if len(points) <= MOST_REPLICAS:
        return points
    names = list(points)
    rest = [points[name] for name in names[MOST_REPLICAS:]]
    others = ReplicaPoint(
        sum(one.running for one in rest),
        sum(one.suspended for one in rest),
        sum(one.slots for one in rest),
    )
    return {name: points[name] for name in names[:MOST_REPLICAS]} | {OTHERS: others}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
