"""Why a pool has no replica: it sleeps, it wakes, or something is wrong."""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum
from typing import Final

from ray.serve._private.common import (
    DeploymentStatus,
    DeploymentStatusInfo,
    DeploymentStatusTrigger,
)
from ray.serve.generated.serve_pb2 import (  # type: ignore[attr-defined]
    DeploymentStatusInfo as StatusProto,
)

from app.controller import serve_controller

logger = logging.getLogger("ray.serve")

_TIMEOUT_S: Final = 2.0


class Standing(StrEnum):
    """What a pool without a replica does."""

    ASLEEP = "asleep"
    """It was scaled to zero, as nobody had asked for a while."""
    WAKING = "waking"
    """It was scaled up from zero, and its first engine starts."""
    AWAY = "away"
    """It is being deployed, or its engines have failed."""


async def standing(application: str, pool: str) -> Standing:
    """Ask Serve why a pool has no replica; where it does not answer, something is wrong."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            controller = await asyncio.to_thread(serve_controller)
            told = await controller.get_deployment_status.remote(pool, application)
    except Exception as error:
        logger.info("cannot ask Serve about pool %s: %s", pool, type(error).__name__)
        return Standing.AWAY
    if told is None:
        return Standing.AWAY
    return read_standing(DeploymentStatusInfo.from_proto(StatusProto.FromString(told)))


def read_standing(told: DeploymentStatusInfo) -> Standing:
    """Return what Serve's status of a deployment without replicas means.

    Serve calls a deployment healthy that has as many replicas as it ought to have, be it none.
    """
    if told.status in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING):
        return Standing.ASLEEP
    scaled = told.status_trigger is DeploymentStatusTrigger.AUTOSCALING
    if told.status is DeploymentStatus.UPSCALING and scaled:
        return Standing.WAKING
    return Standing.AWAY
