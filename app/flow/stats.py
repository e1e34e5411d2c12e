"""Counts outcomes of requests, for the report of one model in one ingress. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from app.contracts.stats import QueueReport
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier
from app.flow.request import QueuedRequest, RequestState


@dataclass(frozen=True, slots=True)
class PoolSlots:
    """The slots of one pool that an ingress knows of.

    Attributes:
        credits: how many it may use.
        taken: how many its requests take.
        free: how many a request of any tier could take now.
    """

    credits: int = 0
    taken: int = 0
    free: int = 0

    def __add__(self, other: PoolSlots) -> PoolSlots:
        return PoolSlots(
            self.credits + other.credits, self.taken + other.taken, self.free + other.free
        )


@dataclass(frozen=True, slots=True)
class QueueState:
    """The queue of one model in one ingress at one moment, for metrics.

    Attributes:
        waiting: how many slots waiting requests would take, by tier.
        oldest_s: how long the oldest of them has waited, in seconds, by tier.
        running: how many slots running requests take, by tier.
        sheds: how many requests were shed so far, by tier and reason.
        preemptions: see ``Credits.preemptions``.
        pools: the slots, by pool.
    """

    waiting: Mapping[Tier, int]
    oldest_s: Mapping[Tier, float]
    running: Mapping[Tier, int]
    sheds: Mapping[tuple[Tier, ShedReason], int]
    preemptions: Mapping[Tier, int]
    pools: Mapping[str, PoolSlots]


class Tally:
    """Counts outcomes of the requests of one model in one ingress.

    Attributes:
        unreported: whether anything was counted since the last report.
    """

    def __init__(self) -> None:
        self.unreported = False
        self._placed: Counter[Tier] = Counter()
        self._queued_s = dict.fromkeys(Tier, 0.0)
        self._sheds: Counter[tuple[Tier, ShedReason]] = Counter()
        self._arrived: Counter[Tier] = Counter()
        self._finished: Counter[Tier] = Counter()
        self._served_s = dict.fromkeys(Tier, 0.0)

    def arrive(self, request: QueuedRequest) -> None:
        """Count a request that has just arrived, at the tier at which it is queued."""
        self.unreported = True
        self._arrived[request.tier] += 1

    def end(self, request: QueuedRequest, now: float) -> None:
        """Count a placed request that has ended."""
        self.unreported = True
        self._finished[request.tier] += 1
        self._served_s[request.tier] += now - request.placed

    def count(self, request: QueuedRequest) -> None:
        """Count a request that has just been placed or shed."""
        self.unreported = True
        if request.state is RequestState.SHED:
            assert request.shed is not None, "a shed request has a reason"
            self._sheds[request.tier, request.shed] += 1
        elif not request.replayed:
            # A replay was counted before, and spent part of the time on an engine.
            self._placed[request.tier] += 1
            self._queued_s[request.tier] += request.placed - request.arrived

    @property
    def sheds(self) -> dict[tuple[Tier, ShedReason], int]:
        """How many requests were shed so far, by tier and reason."""
        return dict(self._sheds)

    def report(
        self, at: float, *, headroom: int, grants_per_s: Mapping[Tier, float]
    ) -> QueueReport:
        """Return everything counted so far; see ``QueueReport``."""
        self.unreported = False
        return QueueReport(
            at=at,
            headroom=headroom,
            grants_per_s=grants_per_s,
            placed={tier: self._placed[tier] for tier in Tier},
            queued_s=dict(self._queued_s),
            sheds=self.sheds,
            arrived={tier: self._arrived[tier] for tier in Tier},
            finished={tier: self._finished[tier] for tier in Tier},
            served_s=dict(self._served_s),
        )
