"""Decides a model's replicas over time, with the state kept between decisions. Pure.

``plan`` knows one moment; ``Scaler`` adds time. Rates are measured, and forecast by the time that
an engine takes to start. A pool grows at once. A replica is stopped only if no plan within the
scale-down window needed it, and never while priority waits. Nothing is stopped until the scaler
itself has observed two and a half such windows, so that a restart of Serve's controller does no
harm. Service times are those of a full fleet (``batch``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.batch import FullBatch
from app.scaling.forecast import CountedDemand, forecast, sudden, window_for
from app.scaling.plan import plan
from app.scaling.report import PoolReport, ScalingReport, TierReport
from app.scaling.starts import Starts
from app.scaling.state import ModelState, Plan, PoolState, ScalingReason, TierDemand

# Longest window for rates, in multiples of ``smoothing_s``. Windows are longer where engines start
# slowly or few requests arrive.
_MOST_WINDOWS = 20
_KEEP_S = 3600.0
# Shortest window below priority, in starts of an engine: these tiers can wait until a rise lasts.
_DEFAULT_STARTS = 2.0
_STARTS_REMEMBERED = 30.0
# Service times are averaged over this window, once this many requests have finished in it.
_SERVICE_WINDOW_S = 600.0
_FINISHED = 5
# A scaler that has just started does not know whether bursts recur. It stops nothing for so many
# times ``scale_down_after_s``: five minutes by default.
_FIRST_WINDOWS = 2.5


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """Serve's values of a pool: its target number of replicas, and the bounds of it."""

    target: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas each pool should have now, and why.

    Attributes:
        replicas: the number of replicas, by pool.
        reasons: the reason for it, by pool.
        why: a summary in one line.
        start_s: how long a replica is expected to take from the decision until it serves, in
            seconds, with the wait for its node; 0 while unknown.
    """

    replicas: Mapping[str, int]
    reasons: Mapping[str, ScalingReason]
    why: str
    start_s: float = 0.0


class Scaler:
    """Decides the replicas of one model."""

    def __init__(self) -> None:
        self._settings = ScalingSettings()
        self._tiers = {tier: _Counts() for tier in Tier}
        self._started: float | None = None
        self._asked = -math.inf
        self._arrived = math.nan
        self._starts: dict[str, Starts] = {}
        self._plans: dict[str, _Highest] = {}
        self._for_priority = _Highest()
        self._full = FullBatch(_SERVICE_WINDOW_S)

    def decide(
        self, report: ScalingReport, bounds: Mapping[str, ReplicaBounds], now: float
    ) -> Decision:
        """Return the decision on a Model's report.

        Args:
            report: the Model's latest report. Pools that are not in it keep their replicas.
            bounds: the pools that Serve scales, by name. Other pools of the report have as many
                replicas as are ready, and these serve requests too.
            now: the time, in seconds, of a monotonic clock.
        """
        self._settings = report.settings
        if self._started is None:
            self._started = self._asked = now
        scaled = [name for name in report.pools if name in bounds]
        start_s = max((self._start_s(report, bounds, name, now) for name in scaled), default=0.0)
        state = self._state(report, bounds, start_s, now)
        if not scaled:
            stay = {name: one.target for name, one in bounds.items()}
            return Decision(stay, {}, "no pools known")
        planned = plan(state, self._settings)
        self._for_priority.add(now, planned.for_priority)
        waits = state.tiers[Tier.PRIORITY].waiting > 0
        kept, reasons = {}, {}
        for pool in state.pools:
            if pool.name not in bounds:
                continue
            name, wanted = pool.name, planned.replicas[pool.name]
            kept[name], reasons[name] = wanted, planned.reasons[name]
            if (lately := self._keep(pool, wanted, start_s, now)) > wanted:
                kept[name], reasons[name] = lately, ScalingReason.NOT_YET
            if waits and pool.replicas > kept[name]:
                kept[name], reasons[name] = pool.replicas, ScalingReason.PRIORITY_WAITS
        stay = {name: one.target for name, one in bounds.items() if name not in kept}
        return Decision(kept | stay, reasons, _explain(state, planned, kept), start_s)

    def _start_s(
        self, report: ScalingReport, bounds: Mapping[str, ReplicaBounds], name: str, now: float
    ) -> float:
        """Return how long a replica takes from the decision until it serves, in seconds."""
        pool = report.pools[name]
        starts = self._starts.setdefault(name, Starts())
        starts.note(now, bounds[name].target, round(pool.ready))
        # Before any start was observed, only the engine's own start time is known.
        return max(pool.start_s, starts.took_s)

    def _state(
        self,
        report: ScalingReport,
        bounds: Mapping[str, ReplicaBounds],
        start_s: float,
        now: float,
    ) -> ModelState:
        arrived = sum(tier.arrived for tier in report.tiers.values())
        present = any(tier.waiting or tier.running for tier in report.tiers.values())
        if present or arrived != self._arrived:
            # The arrivals in a first report may lie far back.
            self._asked = self._asked if math.isnan(self._arrived) and not present else now
            self._arrived = arrived
        tiers = {
            tier: self._tiers[tier].demand(
                one, start_s, now, report.settings.smoothing_s, at_once=tier is Tier.PRIORITY
            )
            for tier, one in report.tiers.items()
        }
        states = tuple(_pool(name, pool, bounds.get(name)) for name, pool in report.pools.items())
        tiers = _with_service(tiers, self._slower(report, now))
        awake = now - self._asked <= self._settings.sleep_after_s
        if not awake:
            # Rates decay slowly, but there have been no requests for long.
            tiers = dict.fromkeys(Tier, TierDemand())
        memory_s = min(self._settings.priority_memory_s, _STARTS_REMEMBERED * start_s)
        remembered = self._for_priority.since(now - memory_s)
        return ModelState(tiers, states, report.headroom, awake, start_s, remembered)

    def _slower(self, report: ScalingReport, now: float) -> float:
        """Return how much longer requests take in a full fleet than they did lately."""
        tiers = report.tiers.values()
        self._full.note(
            now,
            running=sum(tier.running for tier in tiers),
            slots=sum(pool.slots * pool.ready for pool in report.pools.values()),
            finished=sum(tier.finished for tier in tiers),
            served_s=sum(tier.served_s for tier in tiers),
        )
        return self._full.slower(now, _SERVICE_WINDOW_S)

    def _keep(self, pool: PoolState, planned: int, start_s: float, now: float) -> int:
        """Return how many replicas a pool keeps, by the plans of the scale-down window."""
        window_s = max(self._settings.scale_down_after_s, start_s)
        plans = self._plans.setdefault(pool.name, _Highest())
        plans.add(now, planned)
        assert self._started is not None, "it has begun to decide"
        first_s = _FIRST_WINDOWS * self._settings.scale_down_after_s
        if now - self._started < max(window_s, first_s):
            return max(planned, min(pool.replicas, pool.most))
        return plans.since(now - window_s)


class _Highest:
    """The highest of recent numbers."""

    def __init__(self) -> None:
        # Numbers that can still become the highest, the highest first.
        self._numbers: deque[tuple[float, int]] = deque()

    def add(self, now: float, number: int) -> None:
        """Add a number."""
        numbers = self._numbers
        while numbers and numbers[-1][1] <= number:
            numbers.pop()
        numbers.append((now, number))

    def since(self, start: float) -> int:
        """Return the highest number since a time, and drop older ones; 0 if there is none."""
        numbers = self._numbers
        while numbers and numbers[0][0] < start:
            numbers.popleft()
        return numbers[0][1] if numbers else 0


class _Counts:
    """The counts of one tier, and the demand computed from them."""

    def __init__(self) -> None:
        self._arrived = CountedDemand(_KEEP_S)
        self._finished = CountedDemand(_SERVICE_WINDOW_S)
        self._served_s = CountedDemand(_SERVICE_WINDOW_S)
        self._service_s: float | None = None

    def demand(
        self,
        report: TierReport,
        start_s: float,
        now: float,
        smoothing_s: float,
        *,
        at_once: bool,
    ) -> TierDemand:
        for counted, count in (
            (self._arrived, report.arrived),
            (self._finished, report.finished),
            (self._served_s, report.served_s),
        ):
            counted.add(now, count)
        most_s = min(_MOST_WINDOWS * smoothing_s, _KEEP_S / 3)
        starts = 1.0 if at_once else _DEFAULT_STARTS
        least_s = min(max(smoothing_s, starts * start_s), most_s)
        window_s = window_for(self._arrived, now, least_s=least_s, most_s=most_s)
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


def _with_service(tiers: Mapping[Tier, TierDemand], slower: float) -> dict[Tier, TierDemand]:
    """Return the demand with the service times of a full fleet, so many times as long.

    A tier without a known service time gets the mean of the others'.
    """
    known = [one.service_s for one in tiers.values() if one.service_s is not None]
    if not known:
        return dict(tiers)
    like = sum(known) / len(known)
    return {
        tier: replace(one, service_s=slower * (like if one.service_s is None else one.service_s))
        for tier, one in tiers.items()
    }


def _pool(name: str, pool: PoolReport, bounds: ReplicaBounds | None) -> PoolState:
    ready = round(pool.ready)
    bounds = bounds or ReplicaBounds(ready, ready, ready)
    return PoolState(
        name=name,
        slots=max(1, round(pool.slots)),
        replicas=bounds.target,
        least=bounds.least,
        most=bounds.most,
        honours=pool.honours > 0,
        cost=pool.cost,
        preempts=pool.preempts > 0,
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
