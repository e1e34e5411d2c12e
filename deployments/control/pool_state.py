"""Why a pool has no replica, and how long it took to wake.

It sleeps, it wakes, or something is wrong.
"""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum
from typing import Final

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
    """What a pool without a replica does."""

    ASLEEP = "asleep"
    """It was scaled to zero, as nobody had asked for a while."""
    WAKING = "waking"
    """It was scaled up from zero, and its first engine starts."""
    AWAY = "away"
    """It is being deployed, or its engines have failed."""


class Wakings:
    """How long pools took to wake: from when Serve was told until a replica was ready.

    That is more than its engine's start where the replica waited for a node.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def note(self, pool: str, standing: PoolPhase | None, now: float) -> None:
        """Take note of what a pool without a replica does; ``None``: it has one.

        A start that failed, or of which nobody told for a moment, counts with the next one.
        """
        if standing is PoolPhase.WAKING:
            self._since.setdefault(pool, now)
        elif standing is PoolPhase.ASLEEP:
            self._since.pop(pool, None)
        elif standing is None and pool in self._since:
            self._took[pool] = now - self._since.pop(pool)

    def took_s(self, pool: str) -> float:
        """Return how long a pool took the last time; 0 if that was not seen."""
        return self._took.get(pool, 0.0)


async def standing(application: str, pool: str, before: PoolPhase) -> PoolPhase:
    """Ask Serve why no replica of a pool is known; where it does not answer, something is wrong.

    Args:
        application: the model's.
        pool: the pool's name.
        before: what the pool did when Serve was last asked. It does so still where Serve says that
            replicas run: one that has just started is known in a moment, and of one that has just
            died Serve hears when it next checks it.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            controller = await asyncio.to_thread(serve_controller)
            told = await deployment_status(controller, pool, application)
            if told is None:
                return PoolPhase.AWAY
            now = read_standing(told)
            if now is PoolPhase.ASLEEP and before is not PoolPhase.ASLEEP:
                # It costs Serve three times as much, and a pool may sleep for days.
                details = await controller.get_deployment_details.remote(application, pool)
                return before if details.target_num_replicas else now
            return now
    except Exception as error:
        logger.info("cannot ask Serve about pool %s: %s", pool, type(error).__name__)
        return PoolPhase.AWAY


def read_standing(told: DeploymentStatusInfo) -> PoolPhase:
    """Return what Serve's status of a deployment means of which no replica is known.

    Serve calls a deployment healthy that has as many replicas as it ought to have, be it none;
    whether it is none, the status does not tell.
    """
    if told.status in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING):
        return PoolPhase.ASLEEP
    scaled = told.status_trigger is DeploymentStatusTrigger.AUTOSCALING
    if told.status is DeploymentStatus.UPSCALING and scaled:
        return PoolPhase.WAKING
    return PoolPhase.AWAY
