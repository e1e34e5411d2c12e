"""The autoscaling policy of a model application, as Ray Serve calls it.

An application's ``autoscaling_policy`` names ``app.autoscaling:priority_aware``. Serve creates one
policy per application, in its controller. It calls the policy ten times a second for all
deployments that have an ``autoscaling_config``. The Model reports its demand and its settings once
a second (``record_autoscaling_stats``). ``app.scaling`` decides only on a new report. Nothing here
blocks.

Serve pickles this module by value, but not its imports: ``app`` must be importable where Serve's
controller runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from itertools import product
from typing import Any

from app.contracts.news import PoolChange, ScalingDecision
from app.core.names import MODEL_DEPLOYMENT
from app.observe.catalogue import SCALING_CHANGES, SCALING_REPLICAS
from app.ray_compat import notes
from app.ray_compat.metrics import RayMetrics
from app.scaling.decisions import DecisionLog, note_name
from app.scaling.report import ScalingReport
from app.scaling.scaler import Decision, ReplicaBounds, Scaler
from app.scaling.state import ScalingReason

logger = logging.getLogger("ray.serve")


class PriorityAware:
    """Scales the pools of one model by its demand by tier."""

    def __init__(self, **refused: Any) -> None:
        if refused:
            # An exception here would bring down Serve's controller, and with it every application.
            logger.error("policy_kwargs are not used: set `scaling` in the user_config of Model")
        self._scaler = Scaler()
        self._latest: tuple[Any, float] | None = None
        self._decision: Decision | None = None
        self._metrics = _Metrics()
        self._log = DecisionLog()

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
        """Return how many replicas each deployment should have.

        Args:
            contexts: Serve's ``AutoscalingContext`` by ``DeploymentID``.
        """
        pools = {
            context.deployment_name: context
            for context in contexts.values()
            if context.deployment_name != MODEL_DEPLOYMENT
        }
        models = (c for c in contexts.values() if c.deployment_name == MODEL_DEPLOYMENT)
        for model in models:
            try:
                self._receive(model, pools)
            except Exception:
                # An exception from here would stop Serve's control loop for every application.
                logger.exception("cannot decide how %s is scaled", model.app_name)
        decided = self._decision.replicas if self._decision is not None else {}
        replicas = {
            deployment: decided.get(context.deployment_name, context.target_num_replicas)
            for deployment, context in contexts.items()
        }
        return replicas, {}

    def _receive(self, model: Any, pools: Mapping[str, Any]) -> None:
        """Decide again if the Model has sent a new report."""
        latest, metrics = _latest_report(model.raw_metrics or {})
        if latest is None or latest == self._latest:
            return
        report = ScalingReport.from_metrics(metrics)
        if report is None:
            return
        self._latest = latest
        bounds = {
            name: ReplicaBounds(
                context.target_num_replicas,
                context.capacity_adjusted_min_replicas,
                context.capacity_adjusted_max_replicas,
            )
            for name, context in pools.items()
        }
        before = {name: one.target for name, one in bounds.items()}
        decision = self._decision = self._scaler.decide(report, bounds, time.monotonic())
        if decision.replicas != before:
            start = f"; a start takes {decision.start_s:.0f} s" if decision.start_s else ""
            logger.info("%s is scaled: %s%s", model.app_name, decision.why, start)
            self._note(model.app_name, before, decision)
        self._metrics.record(model.app_name, before, decision)

    def _note(self, application: str, before: Mapping[str, int], decision: Decision) -> None:
        """Publish a decision for the Model, which shows it. Does not wait for it."""
        pools = {
            pool: PoolChange(before[pool], replicas, str(decision.reasons.get(pool, "")))
            for pool, replicas in decision.replicas.items()
            if replicas != before[pool]
        }
        self._log.add(ScalingDecision(time.time(), decision.why, pools))
        notes.post(note_name(application), self._log.to_note())


def _latest_report(series: Mapping[str, Mapping[Any, Any]]) -> tuple[tuple[Any, float] | None, Any]:
    """Return the replica and the time of the latest report, and its metrics."""
    points = [
        (points[-1].timestamp, replica)
        for replica, points in series.get("headroom", {}).items()
        if points
    ]
    if not points:
        return None, {}
    when, replica = max(points, key=lambda point: point[0])
    values = {name: of[replica][-1].value for name, of in series.items() if of.get(replica)}
    return (replica, when), values


class _Metrics:
    """Decisions as metrics of Prometheus."""

    def __init__(self) -> None:
        wanted, changes = SCALING_REPLICAS, SCALING_CHANGES
        ray = RayMetrics()
        self._wanted = ray.gauge(wanted.name, wanted.text, wanted.labels)
        self._changes = ray.counter(changes.name, changes.text, changes.labels)
        self._shown: dict[str, str] = {}

    def record(self, application: str, before: Mapping[str, int], decision: Decision) -> None:
        """Record a decision."""
        for pool, reason in decision.reasons.items():
            tags = {"application": application, "pool": pool}
            replicas = decision.replicas[pool]
            shown = self._shown.get(pool)
            if shown is None:
                # There before the first change, which then counts as an increase.
                for direction, why in product(("up", "down"), ScalingReason):
                    self._changes(0, {**tags, "direction": direction, "reason": str(why)})
            elif shown != reason:
                self._wanted(0, {**tags, "reason": str(shown)})
            self._shown[pool] = reason
            self._wanted(replicas, {**tags, "reason": str(reason)})
            if replicas != before[pool]:
                direction = "up" if replicas > before[pool] else "down"
                self._changes(1, {**tags, "direction": direction, "reason": str(reason)})


priority_aware = PriorityAware
"""The policy under the name that config files use."""
POLICY_PATH = "app.autoscaling:priority_aware"
