"""``frontline plan``: shows what a config file would start, without starting it.

The applications are built as Serve builds them. Each deployment class with a ``plan`` method
reports what its replicas would launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml
from ray.serve.config import AutoscalingConfig

from app.cli.applications import build_application
from app.config.model import ModelArgs, ModelSettings, PoolSettings
from app.config.queue import QueueSettings
from app.config.redaction import redact, redact_words
from app.config.scaling import ScalingSettings
from app.contracts.launch import LaunchPlan
from app.core.names import MODEL_DEPLOYMENT
from app.core.tiers import PriorityMode
from app.haproxy.config import connections_for, descriptors_for
from app.ray_compat.application import deployments_of

_AUTO_MAX: Final = 100
"""Serve's ``max_replicas`` if ``num_replicas`` is ``auto``."""
_INGRESS: Final = "Ingress"


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas Serve keeps; both bounds are equal without autoscaling."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool.

    Attributes:
        name: the name of the pool and of its deployment.
        slots: how many requests each replica runs at most at once.
        replicas: how many replicas Serve keeps.
        ray: the Ray resources of each replica: its actor options and its placement group.
        launch: what each replica starts, without secrets.
        priority: how priority requests are handled here, as text.
        slots_auto: whether each replica has as many as fit into its engine, up to ``slots``.
    """

    name: str
    slots: int
    replicas: Replicas
    ray: Mapping[str, Any]
    launch: LaunchPlan
    priority: str
    slots_auto: bool = False


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: its application, its name in requests, its pools, and two of its settings."""

    application: str
    id: str
    priority: PriorityMode
    flex: bool
    pools: tuple[PoolPlan, ...]
    queue: QueueSettings
    scaling: ScalingSettings

    def most_requests(self, ingresses: int) -> int:
        """Return how many requests may run or wait at once, over this many ingresses."""
        slots = sum(pool.slots * pool.replicas.most for pool in self.pools)
        full = max(self.queue.bounds(slots=slots, ingresses=ingresses).values())
        reserved = sum(self.queue.reserved(slots=slots, ingresses=ingresses).values())
        return slots + ingresses * (full + reserved)


@dataclass(frozen=True, slots=True)
class FrontPlan:
    """The limits that the HAProxy of a node needs if all requests pass through it.

    Attributes:
        requests: how many requests of all models may run or wait at once.
        maxconn: the smallest sufficient ``RAY_SERVE_HAPROXY_MAXCONN``.
        descriptors: the open files that it needs (``ulimit -Hn``).
        maxconn_here: the value in this environment; ``None`` if it is not set. Its default is that
            of ``scripts/activate``; without that, Serve has a lower one of its own.
    """

    requests: int
    maxconn: int
    descriptors: int
    maxconn_here: int | None


def make_plan(text: str) -> list[ModelPlan]:
    """Return every model of a config file that has passed ``app.cli.check``."""
    applications = yaml.safe_load(text).get("applications") or ()
    return [model for application in applications for model in _models(application)]


def plan_front(text: str, models: Sequence[ModelPlan], maxconn_here: int | None) -> FrontPlan:
    """Return the limits that the models of a config file require of HAProxy."""
    applications = yaml.safe_load(text).get("applications") or ()
    ingresses = max(1, sum(_ingresses(application) for application in applications))
    requests = sum(model.most_requests(ingresses) for model in models)
    maxconn = connections_for(requests)
    descriptors = descriptors_for(maxconn, servers=ingresses + 1)
    return FrontPlan(requests, maxconn, descriptors, maxconn_here)


def _ingresses(application: Mapping[str, Any]) -> int:
    options = application.get("deployments") or ()
    return sum(_replicas(one).most for one in options if one.get("name") == _INGRESS)


def _models(application: Mapping[str, Any]) -> Iterator[ModelPlan]:
    deployments = {one.name: one for one in deployments_of(build_application(application))}
    if MODEL_DEPLOYMENT not in deployments:
        return
    args = ModelArgs.load(application["args"], "args")
    options = {one["name"]: one for one in application.get("deployments") or ()}
    own = options.get(MODEL_DEPLOYMENT, {}).get("user_config") or {}
    settings = ModelSettings.load(own, "user_config")
    tiers = settings.tiers
    pools = tuple(
        _pool(deployments[pool.name], options.get(pool.name, {}), pool, tiers.priority)
        for pool in args.pools
    )
    yield ModelPlan(
        application["name"], args.id, tiers.priority, tiers.flex, pools, settings.queue,
        settings.scaling,
    )  # fmt: skip


def _pool(
    deployment: Any, options: Mapping[str, Any], pool: PoolSettings, mode: PriorityMode
) -> PoolPlan:
    launch: LaunchPlan = deployment.func_or_class.plan(*deployment.init_args)
    return PoolPlan(
        name=deployment.name,
        slots=pool.most_slots,
        replicas=_replicas(options),
        ray=_ray(deployment, options),
        launch=_without_secrets(launch),
        priority=_priority(mode, launch),
        slots_auto=pool.slots == "auto",
    )


def _replicas(options: Mapping[str, Any]) -> Replicas:
    number, autoscaling = options.get("num_replicas"), options.get("autoscaling_config")
    if autoscaling is None and number != "auto":
        return Replicas(number or 1, number or 1)
    given = {"max_replicas": _AUTO_MAX} if number == "auto" else {}
    config = AutoscalingConfig.model_validate(given | (autoscaling or {}))
    return Replicas(config.min_replicas, config.max_replicas)


def _ray(deployment: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    actor = options.get("ray_actor_options") or deployment.ray_actor_options or {}
    # By default a replica takes one CPU.
    asked: dict[str, Any] = {"num_cpus": 1, **actor}
    grouped = {name: value for name, value in options.items() if name.startswith("placement_group")}
    return asked | grouped


def _without_secrets(launch: LaunchPlan) -> LaunchPlan:
    ranks = (
        replace(
            rank,
            command=tuple(redact_words(rank.command)),
            environment=redact(rank.environment),
        )
        for rank in launch.ranks
    )
    return replace(
        launch,
        command=tuple(redact_words(launch.command)),
        environment=redact(launch.environment),
        files=redact(launch.files),
        ranks=tuple(ranks),
    )


def _priority(mode: PriorityMode, launch: LaunchPlan) -> str:
    routes = ", ".join(launch.priority_routes)
    if mode is PriorityMode.OFF:
        return "served as default: the model does not offer it"
    if mode is PriorityMode.QUEUE:
        also = f"; the engine has it as well on {routes}" if routes else ""
        return f"delivered by the queue alone{also}"
    if routes:
        return f"delivered on {routes}, once the running engine has proved it"
    return "served as default: the engine is started without native priority"
