"""Why a pool has no replica (asleep, waking or away), and how long pools take to wake."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from app.contracts.start import StartFailure, find_failure
from app.ray_compat.controller import (
    DeploymentStatus,
    DeploymentStatusInfo,
    DeploymentStatusTrigger,
    deployment_status,
    serve_controller,
)

logger = logging.getLogger("ray.serve")

_TIMEOUT_S: Final = 2.0


class PoolPhase(StrEnum):
    """Why a pool has no replica."""

    ASLEEP = "asleep"
    """It was scaled to zero, because it received no requests for a while."""
    WAKING = "waking"
    """It was scaled up from zero, and its first engine is starting."""
    AWAY = "away"
    """It is being deployed, or its engines have failed."""


class Wakings:
    """How long pools took to wake: from Serve's scaling up until a replica was ready.

    That is longer than the engine's start if the replica waited for a node.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def note(self, pool: str, state: PoolPhase | None, now: float) -> None:
        """Record the state of a pool at the monotonic time ``now``; ``None``: it has a replica.

        A start that failed, or during which Serve did not answer, is counted together with the
        next one.
        """
        if state is PoolPhase.WAKING:
            self._since.setdefault(pool, now)
        elif state is PoolPhase.ASLEEP:
            self._since.pop(pool, None)
        elif state is None and pool in self._since:
            self._took[pool] = now - self._since.pop(pool)

    def took_s(self, pool: str) -> float:
        """Return how long a pool took to wake the last time, in seconds; 0 if unknown."""
        return self._took.get(pool, 0.0)


@dataclass(frozen=True, slots=True)
class Standing:
    """Why no replica of a pool is known.

    Attributes:
        phase: whether it is asleep, waking or away.
        failure: why its last start failed, if Serve's status of it says so.
        told: whether that status has any message; without one, an earlier failure is over.
    """

    phase: PoolPhase
    failure: StartFailure | None = None
    told: bool = True


async def standing(application: str, pool: str, before: PoolPhase) -> Standing:
    """Ask Serve why no replica of a pool is known; ``AWAY`` if Serve does not answer.

    Args:
        application: the model's Serve application.
        pool: the pool's name.
        before: the pool's state at the last poll. It is kept while Serve reports that replicas run:
            a replica that has just started becomes known in a moment, and Serve notices one that
            has just died at its next health check.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            controller = await asyncio.to_thread(serve_controller)
            status = await deployment_status(controller, pool, application)
            if status is None:
                return Standing(PoolPhase.AWAY)
            now = read_standing(status)
            if now is PoolPhase.ASLEEP and before is not PoolPhase.ASLEEP:
                # Only on a change: this call costs Serve three times as much as the status, and a
                # pool may sleep for days.
                details = await controller.get_deployment_details.remote(application, pool)
                now = before if details.target_num_replicas else now
            return Standing(now, find_failure(status.message), told=bool(status.message))
    except Exception as error:
        logger.info("cannot ask Serve about pool %s: %s", pool, type(error).__name__)
        return Standing(PoolPhase.AWAY)


def read_standing(info: DeploymentStatusInfo) -> PoolPhase:
    """Return the state of a pool without known replicas from Serve's status of its deployment.

    Serve calls a deployment healthy when it has its target number of replicas, which may be zero.
    The status does not show whether the target is zero.
    """
    if info.status in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING):
        return PoolPhase.ASLEEP
    scaled = info.status_trigger is DeploymentStatusTrigger.AUTOSCALING
    if info.status is DeploymentStatus.UPSCALING and scaled:
        return PoolPhase.WAKING
    return PoolPhase.AWAY
