"""Serve's controller, which knows every application and deployment."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private.common import (
    DeploymentStatus,
    DeploymentStatusInfo,
    DeploymentStatusTrigger,
)
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.generated import serve_pb2

__all__ = [
    "DeploymentStatus",
    "DeploymentStatusInfo",
    "DeploymentStatusTrigger",
    "deployment_status",
    "replica_options",
    "serve_controller",
]


def serve_controller() -> Any:
    """Return a handle to the controller's actor. Blocks for a question to Ray's head.

    Raises:
        ValueError: Serve does not run on this cluster.
    """
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


async def deployment_status(
    controller: Any, deployment: str, application: str
) -> DeploymentStatusInfo | None:
    """Return Serve's status of a deployment; ``None`` if it knows none."""
    told = await controller.get_deployment_status.remote(deployment, application)
    if told is None:
        return None
    message: Any = serve_pb2.DeploymentStatusInfo.FromString(told)  # type: ignore[attr-defined]
    status: DeploymentStatusInfo = DeploymentStatusInfo.from_proto(message)
    return status


async def replica_options(controller: Any, deployment: str, application: str) -> dict[str, Any]:
    """Return what a replica of a deployment asks of Ray, as a config file says it."""
    answer = await controller.get_deployment_info.remote(deployment, application)
    route: Any = serve_pb2.DeploymentRoute.FromString(answer)  # type: ignore[attr-defined]
    config = DeploymentInfo.from_proto(route.deployment_info).replica_config
    return {
        **(config.ray_actor_options or {}),
        "placement_group_bundles": config.placement_group_bundles,
        "placement_group_strategy": config.placement_group_strategy,
        "placement_group_bundle_label_selector": config.placement_group_bundle_label_selector,
    }
