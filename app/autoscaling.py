"""The autoscaling policy of a model application, as Ray Serve calls it.

An application's ``autoscaling_policy`` names ``app.autoscaling:priority_aware``. Serve makes one
for each application, in its controller, and calls it ten times a second for all deployments that
have an ``autoscaling_config``. The Model reports demand once a second, and its operator's settings
with it (``record_autoscaling_stats``); only then is anything decided, by ``app.scaling``, and
nothing here ever waits for anything.

Serve pickles this module by value and imports what it imports: ``app`` must be importable where
Serve's controller runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from app.core.names import MODEL_DEPLOYMENT
from app.scaling.report import ScalingReport
from app.scaling.scaler import Decision, ReplicaBounds, Scaler

logger = logging.getLogger("ray.serve")


class PriorityAware:
    """Scales the pools of one model by its demand by tier."""

    def __init__(self, **refused: Any) -> None:
        if refused:
            # Raised here it would bring down Serve's controller, and every application with that.
            logger.error("policy_kwargs are not used: set `scaling` in the user_config of Model")
        self._scaler = Scaler()
        self._heard: tuple[Any, float] | None = None
        self._decision: Decision | None = None
        self._metrics = _Metrics()

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
        """Return how many replicas each deployment is to have.

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
                self._hear(model, pools)
            except Exception:
                # An error from here would end Serve's care for every application.
                logger.exception("cannot decide how %s is scaled", model.app_name)
        decided = self._decision.replicas if self._decision is not None else {}
        replicas = {
            deployment: decided.get(context.deployment_name, context.target_num_replicas)
            for deployment, context in contexts.items()
        }
        return replicas, {}

    def _hear(self, model: Any, pools: Mapping[str, Any]) -> None:
        """Decide anew where the Model has told something new."""
        heard, metrics = _latest(model.raw_metrics or {})
        if heard is None or heard == self._heard:
            return
        report = ScalingReport.from_metrics(metrics)
        if report is None:
            return
        self._heard = heard
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
            logger.info("%s is scaled: %s", model.app_name, decision.why)
        self._metrics.tell(model.app_name, before, decision)


def _latest(series: Mapping[str, Mapping[Any, Any]]) -> tuple[tuple[Any, float] | None, Any]:
    """Return who told something last, and when, and what that was."""
    points = [
        (points[-1].timestamp, replica)
        for replica, points in series.get("headroom", {}).items()
        if points
    ]
    if not points:
        return None, {}
    when, replica = max(points, key=lambda point: point[0])
    told = {name: of[replica][-1].value for name, of in series.items() if of.get(replica)}
    return (replica, when), told


class _Metrics:
    """The same for Prometheus."""

    def __init__(self) -> None:
        self._wanted = Gauge(
            "frontline_scaling_replicas",
            description="How many replicas a pool is to have, and why not fewer.",
            tag_keys=("application", "pool", "reason"),
        )
        self._changes = Counter(
            "frontline_scaling_changes",
            description="How often a pool was given more or fewer replicas, and why.",
            tag_keys=("application", "pool", "direction", "reason"),
        )
        self._told: dict[str, str] = {}

    def tell(self, application: str, before: Mapping[str, int], decision: Decision) -> None:
        """Tell a decision."""
        for pool, reason in decision.reasons.items():
            tags = {"application": application, "pool": pool}
            replicas = decision.replicas[pool]
            if (told := self._told.get(pool)) not in (None, reason):
                self._wanted.set(0, {**tags, "reason": str(told)})
            self._told[pool] = reason
            self._wanted.set(replicas, {**tags, "reason": str(reason)})
            if replicas != before[pool]:
                direction = "up" if replicas > before[pool] else "down"
                self._changes.inc(1, {**tags, "direction": direction, "reason": str(reason)})


priority_aware = PriorityAware
"""By this name config files know the policy."""
POLICY_PATH = "app.autoscaling:priority_aware"
