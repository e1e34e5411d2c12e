"""Sums a model's demand from the reports of its ingresses. Owned by the Model actor. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from app.config.scaling import ScalingSettings
from app.contracts.stats import IngressBoard, QueueReport, Suspended
from app.core.tiers import Tier
from app.scaling.report import PoolReport, ScalingReport, TierReport


class DemandBook:
    """Sums the demand of all ingresses. The counts of an ingress remain after it is gone."""

    def __init__(self) -> None:
        self._known: dict[str, QueueReport] = {}
        self._arrived: Counter[Tier] = Counter()
        self._finished: Counter[Tier] = Counter()
        self._served_s = dict.fromkeys(Tier, 0.0)

    def report(
        self,
        ingresses: Iterable[IngressBoard],
        pools: Mapping[str, PoolReport],
        headroom: float,
        settings: ScalingSettings,
        suspended: Mapping[Tier, Suspended],
    ) -> ScalingReport:
        """Return the report: demand of all ingresses that are not silent, pools and settings.

        Requests that engines have suspended count as waiting.
        """
        boards = list(ingresses)
        known = {board.demand.ingress: board.report for board in boards}
        for name, report in known.items():
            # Counts from before this Model's start belong to the Model before it.
            self._add(report, self._known.get(name, report))
        self._known = known
        none = Suspended()
        tiers = {tier: self._tier(tier, boards, suspended.get(tier, none)) for tier in Tier}
        return ScalingReport(tiers, pools, headroom, settings)

    def _add(self, report: QueueReport, before: QueueReport) -> None:
        for tier in Tier:
            self._arrived[tier] += report.arrived.get(tier, 0) - before.arrived.get(tier, 0)
            self._finished[tier] += report.finished.get(tier, 0) - before.finished.get(tier, 0)
            served_s = report.served_s.get(tier, 0.0) - before.served_s.get(tier, 0.0)
            self._served_s[tier] += served_s

    def _tier(self, tier: Tier, boards: Iterable[IngressBoard], suspended: Suspended) -> TierReport:
        demands = [board.demand for board in boards]
        return TierReport(
            waiting=sum(demand.waiting[tier] for demand in demands) + suspended.slots,
            running=max(0, sum(demand.running[tier] for demand in demands) - suspended.slots),
            oldest_s=max([suspended.oldest_s, *(demand.oldest_s[tier] for demand in demands)]),
            arrived=self._arrived[tier],
            finished=self._finished[tier],
            served_s=self._served_s[tier],
        )
