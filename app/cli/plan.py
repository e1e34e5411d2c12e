"""``frontline plan``: what a config file would start, before anything does.

The applications are built as Serve builds them, and the deployments are asked themselves: whichever
has a ``plan`` says what it would launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml
from ray.serve.config import AutoscalingConfig

from app.cli.applications import build_application
from app.config.model import ModelArgs, ModelSettings
from app.config.queue import QueueSettings
from app.config.redaction import redact, redact_words
from app.contracts.launch import LaunchPlan
from app.core.names import MODEL_DEPLOYMENT
from app.core.tiers import PriorityMode
from app.haproxy.config import connections_for, descriptors_for
from app.ray_compat.application import deployments_of

_AUTO_MAX: Final = 100
"""Serve's ``max_replicas`` where ``num_replicas`` is ``auto``."""
_INGRESS: Final = "Ingress"


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas Serve keeps; both are the same where it does not scale."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool.

    Attributes:
        name: the pool's, and its deployment's.
        slots: requests at once in each replica.
        replicas: how many there are to be.
        ray: what Ray must have for each replica: the options of its actor, and its placement group.
        launch: what each replica starts, without secrets.
        priority: what becomes of priority requests that are placed here, in words.
    """

    name: str
    slots: int
    replicas: Replicas
    ray: Mapping[str, Any]
    launch: LaunchPlan
    priority: str


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: its application, its name in requests, its pools, how its requests wait."""

    application: str
    id: str
    priority: PriorityMode
    flex: bool
    pools: tuple[PoolPlan, ...]
    queue: QueueSettings

    def most_requests(self, ingresses: int) -> int:
        """Return how many requests may run or wait at once, at so many ingresses together."""
        slots = sum(pool.slots * pool.replicas.most for pool in self.pools)
        full = max(self.queue.bounds(slots=slots, ingresses=ingresses).values())
        reserved = sum(self.queue.reserved(slots=slots, ingresses=ingresses).values())
        return slots + ingresses * (full + reserved)


@dataclass(frozen=True, slots=True)
class FrontPlan:
    """What the HAProxy of a node must hold if all requests come through it.

    Attributes:
        requests: how many may run or wait at once, of all models.
        maxconn: least ``RAY_SERVE_HAPROXY_MAXCONN`` for them.
        descriptors: open files that it takes (``ulimit -Hn``).
        maxconn_here: what it is set to in this environment.
    """

    requests: int
    maxconn: int
    descriptors: int
    maxconn_here: int


def make_plan(text: str) -> list[ModelPlan]:
    """Return every model of a config file in which ``app.cli.check`` has found nothing wrong."""
    applications = yaml.safe_load(text).get("applications") or ()
    return [model for application in applications for model in _models(application)]


def plan_front(text: str, models: Sequence[ModelPlan], maxconn_here: int) -> FrontPlan:
    """Return what the models of a config file ask of HAProxy."""
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
        _pool(deployments[pool.name], options.get(pool.name, {}), pool.slots, tiers.priority)
        for pool in args.pools
    )
    yield ModelPlan(application["name"], args.id, tiers.priority, tiers.flex, pools, settings.queue)


def _pool(deployment: Any, options: Mapping[str, Any], slots: int, mode: PriorityMode) -> PoolPlan:
    launch: LaunchPlan = deployment.func_or_class.plan(*deployment.init_args)
    return PoolPlan(
        name=deployment.name,
        slots=slots,
        replicas=_replicas(options),
        ray=_ray(deployment, options),
        launch=_without_secrets(launch),
        priority=_priority(mode, launch),
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
    # A replica takes one CPU unless something else is said.
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
