"""Policies that others publish, and one that knows every rate, for comparison.

- ``Hpa``: what KEDA makes of the vLLM production stack's published example (autoscaling-keda
  in its documentation): Kubernetes' Horizontal
  Pod Autoscaler on the number of waiting requests (5 per replica), asked every 15 s, scaled down
  after 300 s, plus a second trigger on utilisation, as set-ups add it because a queue alone gives
  no reason to scale down one by one: running requests at 80 % of the slots. The larger counts.
- ``Forecaster``: a forecast of the work that arrives (Holt-Winters of statsmodels, by the season
  of a day once there are two), at a stated utilisation.
- ``Ideal``: Frontline's plan for one who knows every rate, measures nothing and preempts.
"""

from __future__ import annotations

import math
import warnings
from collections import deque

import numpy as np

from app.config.queue import QueueSettings
from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.plan import plan
from app.scaling.state import ModelState, PoolState, TierDemand
from scripts.bench.engine_model import EngineModel
from scripts.bench.fleet import View
from scripts.bench.trace_files import Floats
from scripts.bench.traffic import Traffic

_DAY_S = 86_400.0


class Hpa:
    """The Horizontal Pod Autoscaler's algorithm, with the two triggers of the module's text."""

    waiting_per_replica = 5.0
    utilisation = 0.8
    polling_s = 15.0
    stabilisation_s = 300.0
    tolerance = 0.1

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._next = 0.0
        self._recent: deque[tuple[float, int]] = deque()
        self._sizes: deque[tuple[float, int]] = deque()

    def decide(self, view: View) -> int:
        if view.now < self._next:
            return view.target
        self._next = view.now + self.polling_s
        tiers = view.report.tiers.values()
        waiting, running = sum(t.waiting for t in tiers), sum(t.running for t in tiers)
        wanted = max(
            self._wanted(view, waiting, self.waiting_per_replica),
            self._wanted(view, running, self.utilisation * self._slots),
        )
        sizes = self._sizes
        sizes.append((view.now, view.target))
        while sizes[0][0] < view.now - self.polling_s:
            sizes.popleft()
        # Up by 100 % or 4 replicas in 15 s, whichever is more: Kubernetes' default.
        before = sizes[0][1]
        wanted = min(wanted, max(2 * before, before + 4))
        recent = self._recent
        recent.append((view.now, wanted))
        while recent[0][0] < view.now - self.stabilisation_s:
            recent.popleft()
        if wanted < view.target:
            return min(view.target, max(number for _, number in recent))
        return wanted

    def _wanted(self, view: View, total: float, each: float) -> int:
        """Return the replicas at which each has its share of a sum (AverageValue)."""
        if view.target and abs(total / (each * view.target) - 1) <= self.tolerance:
            return view.target
        return math.ceil(total / each)


class Forecaster:
    """Forecasts arrivals with Holt-Winters, and provides for a share of the slots to be busy."""

    utilisation = 0.8
    bin_s = 60.0
    season_bin_s = 600.0

    def __init__(self, engine: EngineModel, start_s: float, request_s: float) -> None:
        """Take the replica-seconds of a mean request as known, as profiled beforehand."""
        self._start_s = start_s
        self._request_s = request_s
        self._bins: dict[float, list[float]] = {self.bin_s: [], self.season_bin_s: []}
        self._last: dict[float, float] = dict.fromkeys(self._bins, 0.0)
        self._level = 0.0
        self._season: Floats | None = None
        self._target = 0

    def decide(self, view: View) -> int:
        arrived = sum(tier.arrived for tier in view.report.tiers.values())
        due = False
        for length, bins in self._bins.items():
            if view.now >= (len(bins) + 1) * length - 1e-6:
                bins.append((arrived - self._last[length]) / length)
                self._last[length] = arrived
                due = True
        if not due or not self._bins[self.bin_s]:
            return self._target or view.target
        rate = self._forecast(view.now)
        self._target = math.ceil(rate * self._request_s / self.utilisation)
        return self._target

    def _forecast(self, now: float) -> float:
        short, long = self._bins[self.bin_s], self._bins[self.season_bin_s]
        season = round(_DAY_S / self.season_bin_s)
        if len(long) >= 2 * season:
            if len(long) % season == 0 or self._season is None:
                self._season = self._fit(np.array(long[-7 * season :]), season)
            ahead = math.ceil((now + self._start_s) / self.season_bin_s) - 1
            now_bin = len(long) - 1
            # The day's course by the model, corrected by how today's last bins differ from it.
            assert self._season is not None
            usual = np.mean([self._season[(now_bin - back) % season] for back in range(3)])
            today = float(np.mean(long[-3:]))
            coming = max(self._season[ahead % season], self._season[(ahead + 1) % season])
            return max(0.0, float(coming * today / max(usual, 1e-9)))
        if len(short) < 10:
            return max(short)
        ahead = max(1, math.ceil(self._start_s / self.bin_s))
        return self._trend(np.array(short[-60:]), ahead)

    @staticmethod
    def _fit(values: Floats, season: int) -> Floats:
        """Return a day's course after whole days, by Holt-Winters with an additive season."""
        from statsmodels.tsa.holtwinters import ExponentialSmoothing

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ExponentialSmoothing(values, seasonal="add", seasonal_periods=season)
            fitted = model.fit(optimized=True, use_brute=False)
        course: Floats = np.maximum(fitted.forecast(season), 0.05 * float(values.mean()))
        return course

    @staticmethod
    def _trend(values: Floats, ahead: int) -> float:
        """Return the highest of the next bins, by Holt's damped trend."""
        from statsmodels.tsa.holtwinters import Holt

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Holt(values, damped_trend=True, initialization_method="estimated")
            fitted = model.fit(
                smoothing_level=0.5, smoothing_trend=0.1, damping_trend=0.9, optimized=False
            )
        return max(0.0, float(np.max(fitted.forecast(ahead))))


class Ideal:
    """The least that meets the same standard, for one who knows every rate.

    The work of priority and default in a window around each moment is known. A replica is ordered
    just as early as it takes to start, and stopped if it will not be needed before another could be
    started. Flex gets what is left.
    """

    window_s = 60.0

    def __init__(
        self, traffic: Traffic, engine: EngineModel, start_s: float, most: int, control_s: float
    ) -> None:
        self._control_s = control_s
        self._ahead = math.ceil(start_s / control_s) + 2
        steps = int(traffic.seconds / control_s) + 1
        index = np.minimum((traffic.columns[:, 0] / control_s).astype(int), steps - 1)
        loads = []
        for rank in range(2):
            own = traffic.columns[:, 1] == rank
            busy = np.bincount(index[own], traffic.work[own], minlength=steps) / control_s
            width = max(1, round(self.window_s / control_s))
            loads.append(np.convolve(busy, np.ones(width) / width, mode="same"))
        needs: dict[tuple[float, float], int] = {}
        self._needs = []
        pool = PoolState("pool", engine.slots, 1, 1, most, preempts=True)
        for priority, default in zip(*loads, strict=True):
            # In steps of a quarter of a replica, so that few plans are computed, or finer.
            parts = 4 if priority + default > 4 else 32
            step = engine.slots / parts
            key = (step * math.ceil(parts * priority), step * math.ceil(parts * default))
            if key not in needs:
                tiers = dict.fromkeys(Tier, TierDemand())
                tiers[Tier.PRIORITY] = TierDemand(rate=key[0], service_s=1.0)
                tiers[Tier.DEFAULT] = TierDemand(rate=key[1], service_s=1.0)
                headroom = QueueSettings().headroom_share(preempts=True)
                state = ModelState(tiers, (pool,), headroom, start_s=start_s)
                needs[key] = plan(state, ScalingSettings()).replicas["pool"]
            self._needs.append(needs[key])

    def decide(self, view: View) -> int:
        first = int(view.now / self._control_s)
        return max(self._needs[first : first + self._ahead], default=1)
