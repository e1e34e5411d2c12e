"""Counts what becomes of requests, for the report of one model in one ingress. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from app.contracts.stats import QueueReport
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier
from app.flow.request import QueuedRequest, RequestState


class Tally:
    """Counts what becomes of the requests of one model in one ingress.

    Attributes:
        untold: whether anything was counted since the last report.
    """

    def __init__(self) -> None:
        self.untold = False
        self._placed: Counter[Tier] = Counter()
        self._queued_s = dict.fromkeys(Tier, 0.0)
        self._sheds: Counter[tuple[Tier, ShedReason]] = Counter()
        self._arrived: Counter[Tier] = Counter()
        self._finished: Counter[Tier] = Counter()
        self._served_s = dict.fromkeys(Tier, 0.0)

    def arrive(self, request: QueuedRequest) -> None:
        """Count a request that has just come, at the tier at which it stands in the queue."""
        self.untold = True
        self._arrived[request.tier] += 1

    def end(self, request: QueuedRequest, now: float) -> None:
        """Count a placed request that is over."""
        self.untold = True
        self._finished[request.tier] += 1
        self._served_s[request.tier] += now - request.placed

    def count(self, request: QueuedRequest) -> None:
        """Count a request that is told just now that it has been placed or shed."""
        self.untold = True
        if request.state is RequestState.SHED:
            assert request.shed is not None, "who is shed is told why"
            self._sheds[request.tier, request.shed] += 1
        elif not request.replayed:
            # A replay has been counted once, and was with an engine for part of the time.
            self._placed[request.tier] += 1
            self._queued_s[request.tier] += request.placed - request.arrived

    def report(
        self, at: float, *, headroom: int, grants_per_s: Mapping[Tier, float]
    ) -> QueueReport:
        """Return everything counted so far; see ``QueueReport``."""
        self.untold = False
        return QueueReport(
            at=at,
            headroom=headroom,
            grants_per_s=grants_per_s,
            placed={tier: self._placed[tier] for tier in Tier},
            queued_s=dict(self._queued_s),
            sheds=dict(self._sheds),
            arrived={tier: self._arrived[tier] for tier in Tier},
            finished={tier: self._finished[tier] for tier in Tier},
            served_s=dict(self._served_s),
        )
