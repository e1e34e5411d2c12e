"""The policies that are put beside each other.

They are Frontline's, the same with foresight, Ray Serve's own, and a fixed fleet.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest.mock import patch

from ray.serve import autoscaling_policy
from ray.serve._private import autoscaling_state
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig

from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.plan import plan
from app.scaling.report import ScalingReport
from app.scaling.scaler import ReplicaBounds, Scaler
from app.scaling.state import ModelState, PoolState, TierDemand
from scripts.bench.fleet import View
from scripts.bench.traces import MIX, SLOTS, Trace

_DEPLOYMENT = DeploymentID("pool", "model")


class Fixed:
    """So many replicas, whatever comes."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def decide(self, view: View) -> int:
        return self._replicas


class PriorityAware:
    """`app.scaling`, as `app.autoscaling` calls it: a report old, which is what Serve takes."""

    def __init__(self, settings: ScalingSettings, most: int, least: int = 1) -> None:
        self._scaler = Scaler()
        self._settings = settings
        self._bounds = least, most
        self._report: ScalingReport | None = None

    def decide(self, view: View) -> int:
        report, self._report = self._report, replace(view.report, settings=self._settings)
        if report is None:
            return view.target
        bounds = {"pool": ReplicaBounds(view.target, *self._bounds)}
        return self._scaler.decide(report, bounds, view.now).replicas["pool"]


class Foresight:
    """`app.scaling.plan` for one who knows every rate there was and will be, and measures nothing.

    It orders a replica just as early as it takes to start, and stops one that will not be needed
    before one could be started again: what the same standard of service costs at the least.
    """

    def __init__(self, trace: Trace, settings: ScalingSettings, most: int, headroom: float) -> None:
        self._trace = trace
        self._settings = settings
        self._pool = PoolState("pool", SLOTS, 1, 1, most)
        self._headroom = headroom
        need, steps = cache(self._need), int(trace.seconds / trace.control_s) + 1
        self._needs = [need(self._levels(step * trace.control_s)) for step in range(steps)]

    def decide(self, view: View) -> int:
        step_s = self._trace.control_s
        first = int(view.now / step_s)
        return max(self._needs[first : first + math.ceil(self._trace.start_s / step_s) + 2])

    def _levels(self, when: float) -> tuple[float, ...]:
        # Rounded, so that not every step of a day is computed anew.
        return tuple(round(self._trace.level(rank, when), 3) for rank in range(len(MIX)))

    def _need(self, levels: Sequence[float]) -> int:
        trace = self._trace
        busy = trace.replicas * SLOTS / trace.service_s
        tiers = {
            tier: TierDemand(rate=share * level * busy, service_s=trace.service_s)
            for tier, share, level in zip(Tier, MIX, levels, strict=True)
        }
        state = ModelState(tiers, (self._pool,), self._headroom, start_s=trace.start_s)
        return plan(state, self._settings).replicas["pool"]


class ServesOwn:
    """Ray Serve's default policy: its own code, with its own delays, averages and bounds.

    It sees every request that waits or runs, as it does where all come through its handles, and
    sees them at once and not ten seconds later, as by its default.
    """

    def __init__(self, target_ongoing_requests: float, most: int, **config: float) -> None:
        self._clock = _Clock()
        settings = AutoscalingConfig(
            min_replicas=1,
            max_replicas=most,
            target_ongoing_requests=target_ongoing_requests,
            **config,
        )
        self._look_back_s = settings.look_back_period_s
        self._samples: deque[TimeStampedValue] = deque()
        self._state = autoscaling_state.DeploymentAutoscalingState(_DEPLOYMENT)
        deployment = DeploymentConfig(autoscaling_config=settings)
        # It only looks at the settings of autoscaling.
        info = DeploymentInfo(deployment, None, 0, "")  # type: ignore[arg-type]
        self._state.register(info, 1)
        self._ready = 0

    def decide(self, view: View) -> int:
        self._clock.now = view.now
        samples = self._samples
        samples.append(TimeStampedValue(view.now, float(view.total)))
        while samples[0].timestamp < view.now - self._look_back_s:
            samples.popleft()
        if view.ready != self._ready:
            self._ready = view.ready
            ids = [ReplicaID(str(number), _DEPLOYMENT) for number in range(view.ready)]
            self._state.update_running_replica_ids(ids)
        with _at(self._clock):
            self._state.record_request_metrics_for_handle(
                HandleMetricReport(
                    _DEPLOYMENT, "ingress", "", DeploymentHandleSource.UNKNOWN,
                    list(samples), {}, view.now,
                )
            )  # fmt: skip
            return self._state.get_decision_num_replicas(view.target)


class _Clock:
    """Stands in for the module `time` in Serve's code."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@contextmanager
def _at(clock: _Clock) -> Iterator[None]:
    with (
        patch.object(autoscaling_policy, "time", clock),
        patch.object(autoscaling_state, "time", clock),
    ):
        yield


logging.getLogger("ray.serve").setLevel(logging.WARNING)
