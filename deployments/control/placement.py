"""What of a model's pools no node of the cluster offers: asked of Serve and Ray, now and then.

It is asked only for pools that have no replica, and never on the way of a request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app import supervision
from app.ray_compat.cluster import autoscaling_state
from app.ray_compat.controller import replica_options, serve_controller
from deployments.control.feasibility import Need, Node

logger = logging.getLogger("ray.serve")

_LOOK_S: Final = 2.0
_ANSWER_S: Final = 5.0


class PlacementWatch:
    """Watches whether the pools of one model could be placed at all."""

    def __init__(
        self,
        application: str,
        without_replicas: Callable[[], list[str]],
        changed: Callable[[], None],
    ) -> None:
        self.missing: Mapping[str, str] = {}
        """By pool, what no node offers of what a replica of it asks for, in words."""
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
            # Nobody is turned away for what could not be found out.
            except (RayError, RayServeException, TimeoutError, ValueError) as error:
                logger.debug("cannot look for nodes: %s", type(error).__name__)
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
        nodes, scaling = await asyncio.gather(
            asyncio.to_thread(cluster_nodes), asyncio.to_thread(autoscaling_state, _ANSWER_S)
        )
        missing = {}
        for pool in pools:
            need = await self._need(pool)
            words = need.missing(nodes)
            if words and not can_grow(scaling, need):
                missing[pool] = words
        return missing

    async def _need(self, pool: str) -> Need:
        # A new handle each time: the controller may have been started anew.
        controller = await asyncio.to_thread(serve_controller)
        return Need.of(await replica_options(controller, pool, self._application))


def cluster_nodes() -> list[Node]:
    """Return the nodes that are alive. Blocks for a question to Ray's head."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], node["Labels"]) for node in nodes if node["Alive"]]


def can_grow(scaling: Any, need: Need) -> bool:
    """Whether Ray's autoscaler may still bring a node for what is needed.

    ``scaling`` is Ray's ``AutoscalingState``. There is an autoscaler (v2) if it has told its state,
    which names the requests that fit no kind of node that it can bring.
    """
    if not scaling.autoscaler_state_version:
        return False
    refused = [dict(request.resources_bundle) for request in scaling.infeasible_resource_requests]
    return not any(_asks_for(request, need) for request in refused)


def _asks_for(request: Mapping[str, float], need: Need) -> bool:
    asked = {name: amount for name, amount in request.items() if amount}
    return any(asked == {n: a for n, a in one.resources.items() if a} for one in need.bundles)
