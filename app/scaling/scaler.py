"""Decides a model's replicas again and again, with what must be remembered. Pure.

``plan`` knows one moment; this adds time. Rates are measured and looked ahead by what an engine
takes to start. Growth happens at once. A replica is stopped only once no plan of the last while
had a use for it, and none is while priority waits. Nothing is stopped before this has looked on for
so long itself, so that a controller that was restarted does no harm.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from app.scaling.forecast import Counted, forecast, sudden
from app.scaling.plan import plan
from app.scaling.report import PoolReport, ScalingReport, TierReport
from app.scaling.settings import ScalingSettings
from app.scaling.state import ModelState, Plan, PoolState, Reason, TierDemand
from app.tiers import Tier

# Rates are measured over longer where engines start slowly, up to so many times ``smoothing_s``.
_MOST_WINDOWS = 5
# Service times are averaged over so many seconds, once so many requests have finished in them.
_SERVICE_WINDOW_S = 600.0
_FINISHED = 5


@dataclass(frozen=True, slots=True)
class Bounds:
    """What Serve knows of a pool: its target number of replicas, and between which it may be."""

    target: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas each pool is to have now, why, and the same in one line for people."""

    replicas: Mapping[str, int]
    reasons: Mapping[str, Reason]
    why: str


class Scaler:
    """Decides for one model."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings
        self._tiers = {tier: _Counts(settings) for tier in Tier}
        self._started: float | None = None
        self._asked = -math.inf
        self._arrived = math.nan
        # Plans of the last while that could still be the highest, by pool, the highest first.
        self._plans: dict[str, deque[tuple[float, int]]] = {}

    def decide(self, report: ScalingReport, bounds: Mapping[str, Bounds], now: float) -> Decision:
        """Return what to do on a Model's report.

        Args:
            report: what the Model told last. Pools that it does not know stay as they are.
            bounds: the pools that Serve scales, by name. Others have as many replicas as are
                ready, which serve all the same.
            now: seconds, of a clock that does not go back.
        """
        if self._started is None:
            self._started = self._asked = now
        scaled = [name for name in report.pools if name in bounds]
        start_s = max((report.pools[name].start_s for name in scaled), default=0.0)
        state = self._state(report, bounds, start_s, now)
        if not scaled:
            stay = {name: one.target for name, one in bounds.items()}
            return Decision(stay, {}, "no pools known")
        planned = plan(state, self._settings)
        waits = state.tiers[Tier.PRIORITY].waiting > 0
        kept, reasons = {}, {}
        for pool in state.pools:
            if pool.name not in bounds:
                continue
            name, wanted = pool.name, planned.replicas[pool.name]
            kept[name], reasons[name] = wanted, planned.reasons[name]
            if (lately := self._keep(pool, wanted, start_s, now)) > wanted:
                kept[name], reasons[name] = lately, Reason.NOT_YET
            if waits and pool.replicas > kept[name]:
                kept[name], reasons[name] = pool.replicas, Reason.PRIORITY_WAITS
        stay = {name: one.target for name, one in bounds.items() if name not in kept}
        return Decision(kept | stay, reasons, _explain(state, planned, kept))

    def _state(
        self,
        report: ScalingReport,
        bounds: Mapping[str, Bounds],
        start_s: float,
        now: float,
    ) -> ModelState:
        arrived = sum(tier.arrived for tier in report.tiers.values())
        present = any(tier.waiting or tier.running for tier in report.tiers.values())
        if present or arrived != self._arrived:
            # A first report only tells what came before anybody looked.
            self._asked = self._asked if math.isnan(self._arrived) and not present else now
            self._arrived = arrived
        tiers = {
            tier: self._tiers[tier].demand(one, start_s, now, at_once=tier is Tier.PRIORITY)
            for tier, one in report.tiers.items()
        }
        states = tuple(_pool(name, pool, bounds.get(name)) for name, pool in report.pools.items())
        awake = now - self._asked <= self._settings.sleep_after_s
        return ModelState(tiers, states, report.headroom, awake)

    def _keep(self, pool: PoolState, planned: int, start_s: float, now: float) -> int:
        """Return how many replicas a pool keeps, by the plans of the last while."""
        window_s = max(self._settings.scale_down_after_s, start_s)
        plans = self._plans.setdefault(pool.name, deque())
        while plans and plans[-1][1] <= planned:
            plans.pop()
        plans.append((now, planned))
        while plans[0][0] < now - window_s:
            plans.popleft()
        assert self._started is not None, "it has begun to decide"
        if now - self._started < window_s:
            return max(planned, min(pool.replicas, pool.most))
        return plans[0][1]


class _Counts:
    """What is counted of one tier."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings
        self._arrived = Counted(settings.smoothing_s)
        self._finished = Counted(_SERVICE_WINDOW_S)
        self._served_s = Counted(_SERVICE_WINDOW_S)
        self._service_s: float | None = None

    def demand(
        self, report: TierReport, start_s: float, now: float, *, at_once: bool
    ) -> TierDemand:
        smoothing_s = self._settings.smoothing_s
        window_s = max(smoothing_s, min(start_s, _MOST_WINDOWS * smoothing_s))
        self._arrived.keep(2 * window_s)
        for counted, count in (
            (self._arrived, report.arrived),
            (self._finished, report.finished),
            (self._served_s, report.served_s),
        ):
            counted.add(now, count)
        rate = forecast(self._arrived, now, window_s=window_s, ahead_s=start_s)
        if at_once:
            rate = max(rate, sudden(self._arrived, now, window_s=window_s))
        return TierDemand(
            waiting=round(report.waiting),
            running=round(report.running),
            oldest_s=report.oldest_s,
            rate=rate,
            service_s=self._service(now),
        )

    def _service(self, now: float) -> float | None:
        finished = self._finished.grown(now - _SERVICE_WINDOW_S, now)
        if finished >= _FINISHED:
            self._service_s = self._served_s.grown(now - _SERVICE_WINDOW_S, now) / finished
        return self._service_s


def _pool(name: str, pool: PoolReport, bounds: Bounds | None) -> PoolState:
    ready = round(pool.ready)
    bounds = bounds or Bounds(ready, ready, ready)
    return PoolState(
        name=name,
        slots=max(1, round(pool.slots)),
        replicas=bounds.target,
        least=bounds.least,
        most=bounds.most,
        honours=pool.honours > 0,
        cost=pool.cost,
    )


def _explain(state: ModelState, planned: Plan, kept: Mapping[str, int]) -> str:
    words = []
    for pool in state.pools:
        if pool.name not in kept:
            continue
        wanted, becomes = planned.replicas[pool.name], kept[pool.name]
        words.append(f"{pool.name} {pool.replicas} -> {becomes}{_because(pool, wanted, becomes)}")
    return f"{', '.join(words)}: {planned.why}"


def _because(pool: PoolState, wanted: int, becomes: int) -> str:
    if becomes > wanted:
        return f" (waiting to go down to {wanted})"
    if becomes == pool.most:
        return " (its most)"
    return " (its least)" if becomes == pool.least else ""
