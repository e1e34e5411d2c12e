"""Polls Serve and Ray for pools that no node of the cluster can run.

It checks only pools without replicas, every two seconds, and never on a request's path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app import alarms, supervision
from app.ray_compat.cluster import refused_requests
from app.ray_compat.controller import replica_options, serve_controller
from deployments.control.feasibility import Need, Node

_LOOK_S: Final = 2.0
_ANSWER_S: Final = 5.0


class PlacementWatch:
    """Watches whether the pools of one model can be placed at all.

    Args:
        application: the model's Serve application.
        without_replicas: returns the names of the pools without replicas.
        changed: called after ``missing`` has changed.
    """

    def __init__(
        self,
        application: str,
        without_replicas: Callable[[], list[str]],
        changed: Callable[[], None],
    ) -> None:
        self.missing: Mapping[str, str] = {}
        """For each pool that cannot be placed, the requirements that no node meets, as text."""
        self._application = application
        self._without_replicas = without_replicas
        self._changed = changed
        self._task = supervision.keep_running("placement watch", self._watch, about=application)

    async def stop(self) -> None:
        """Stop watching."""
        await supervision.stop(self._task)

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    missing = await self._look(self._without_replicas())
            # If the check fails, every pool counts as placeable: no request is refused for that.
            except (RayError, RayServeException, TimeoutError, ValueError) as error:
                what = f"{self._application}: {type(error).__name__}; its pools count as placeable"
                alarms.PROCESS.raised("nodes not checked", what)
                missing = {}
            except Exception:
                self._take({})
                raise
            self._take(missing)
            await asyncio.sleep(_LOOK_S)

    def _take(self, missing: dict[str, str]) -> None:
        if missing != self.missing:
            self.missing = missing
            self._changed()

    async def _look(self, pools: list[str]) -> dict[str, str]:
        if not pools:
            return {}
        nodes, refused = await asyncio.gather(
            asyncio.to_thread(cluster_nodes), asyncio.to_thread(refused_requests, _ANSWER_S)
        )
        missing = {}
        for pool in pools:
            need = await self._need(pool)
            words = need.missing(nodes)
            if words and not need.can_come(refused):
                missing[pool] = words
        return missing

    async def _need(self, pool: str) -> Need:
        # A new handle each time, because the controller may have been restarted.
        controller = await asyncio.to_thread(serve_controller)
        return Need.of(await replica_options(controller, pool, self._application))


def cluster_nodes() -> list[Node]:
    """Return the nodes that are alive. Blocks for one call to Ray's head node."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node["Labels"]) for node in nodes if node["Alive"]]
