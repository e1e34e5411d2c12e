"""Engines that span several nodes: the parts on the other nodes, and their common end.

An engine replica whose pool has ``nodes: 2`` runs one engine on two nodes. Serve reserves a
placement group for each such replica (``placement_group_bundles``). The replica itself, with the
engine's first part, takes the first bundle. Each further part has an actor, which takes one of the
other bundles. If an engine process, an actor or a node ends, the whole engine is ended: parts that
wait for a lost one wait forever, and hold their GPUs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app import supervision
from app.config.model import PoolSettings
from deployments.engines.base import NodeSpan
from deployments.engines.registry import adapter_named
from deployments.hosting.guard import LOOPBACK
from deployments.hosting.launch import make_launch, start_engine
from deployments.hosting.ports import ReservedPort, reserve_port
from deployments.process.supervisor import sweep_orphans

logger = logging.getLogger("ray.serve")

_NAMED_RESOURCES: Final = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


class RankEnded(RuntimeError):
    """A part of an engine on another node has ended or does not answer."""


class RankFailedToStart(RuntimeError):
    """A part of an engine cannot be placed or did not start."""


def node_address() -> str:
    """Return this node's address, as Ray knows it."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def lead(pool: PoolSettings) -> tuple[NodeSpan, ReservedPort | None]:
    """Return the span of a replica whose first part runs here, and its rendezvous port.

    The port is ``None`` for an engine on one node.
    """
    if pool.nodes == 1:
        return NodeSpan(), None
    here = node_address()
    port = reserve_port(here)
    return NodeSpan(pool.nodes, 0, here, here, port.port), port


class Rank:
    """The actor of one further part of an engine, on that part's node."""

    async def start(self, model_id: str, pool: PoolSettings, key: str, span: NodeSpan) -> None:
        """Start this node's part of the engine.

        Raises:
            SettingsError: a path of the pool names a variable that is not set on this node.
            EngineNotStarted: its command cannot be run.
            OSError: its log cannot be written.
        """
        await asyncio.to_thread(sweep_orphans)
        adapter = adapter_named(pool.engine)
        self._port = reserve_port(LOOPBACK)
        span = replace(span, here=node_address())
        launch = make_launch(
            model_id, pool, host=LOOPBACK, port=self._port.port, key=key, span=span
        )
        self._process = await start_engine(adapter, launch, pool)

    async def ended(self) -> str:
        """Wait until the part has ended; return its exit status and its last log lines."""
        status = await self._process.wait()
        return f"status {status}; its last lines:\n{self._process.tail()}"

    async def answer(self) -> None:
        """Return at once; a call that completes shows that this actor is alive."""

    async def stop(self) -> None:
        """End this part; return when no process of it is left."""
        await self._process.stop()


class OtherRanks:
    """The further parts of one engine, owned by its replica."""

    def __init__(self, actors: list[Any], on_end: Callable[[], None]) -> None:
        self._actors = actors
        self._on_end = on_end
        self._problem: str | None = None
        self._watchers = [
            supervision.run_once("engine part watch", partial(self._watch, rank, actor))
            for rank, actor in enumerate(actors, 1)
        ]

    @classmethod
    async def start(
        cls,
        model_id: str,
        pool: PoolSettings,
        key: str,
        span: NodeSpan,
        *,
        on_end: Callable[[], None],
    ) -> OtherRanks:
        """Start every further part, each in its bundle of this replica's placement group.

        Args:
            model_id: the model's id.
            pool: the pool's settings.
            key: the engine's secret.
            span: the span of the first part.
            on_end: called once, when the first of the parts has ended for any reason.

        Raises:
            RankFailedToStart: there are fewer bundles than parts, or a part could not be started.
        """
        group = ray.util.get_current_placement_group()
        if group is None or group.bundle_count < span.nodes:
            raise RankFailedToStart(
                f"pool {pool.name!r} runs on {span.nodes} nodes: its deployment needs as many "
                "placement_group_bundles"
            )
        actors = [_place(group, rank) for rank in range(1, span.nodes)]
        starting = [
            actor.start.remote(model_id, pool, key, replace(span, rank=rank))
            for rank, actor in enumerate(actors, 1)
        ]
        try:
            await asyncio.gather(*starting)
        except Exception as error:
            for actor in actors:
                ray.kill(actor)
            raise RankFailedToStart(f"a part of the engine did not start: {error}") from None
        return cls(actors, on_end)

    def check(self) -> None:
        """Raise RankEnded if a part is known to have ended."""
        if self._problem is not None:
            raise RankEnded(self._problem)

    async def check_answers(self, timeout_s: float) -> None:
        """Check that the actors of all parts answer within ``timeout_s`` seconds.

        Raises:
            RankEnded: a part has ended, or its actor does not answer in time.
        """
        self.check()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(actor.answer.remote() for actor in self._actors))
        except Exception as error:
            raise RankEnded(
                f"a part of the engine does not answer: {type(error).__name__}"
            ) from None

    async def stop(self) -> None:
        """End all parts."""
        await supervision.stop(*self._watchers)
        # If an actor has ended already, its reaper has ended the engine process too.
        stopping = [actor.stop.remote() for actor in self._actors]
        await asyncio.gather(*stopping, return_exceptions=True)
        for actor in self._actors:
            try:
                ray.kill(actor)
            except Exception as error:
                logger.warning("a part of the engine cannot be ended: %s", type(error).__name__)

    async def _watch(self, rank: int, actor: Any) -> None:
        try:
            how = await actor.ended.remote()
        except Exception as error:
            how = f"its node or its actor is lost ({type(error).__name__})"
        if self._problem is None:
            self._problem = f"part {rank} of the engine has ended: {how}"
            logger.error("%s", self._problem)
            self._on_end()


def _place(group: PlacementGroup, bundle: int) -> Any:
    """Return an actor that takes all resources of a bundle, so that it sees the bundle's GPUs."""
    options: dict[str, Any] = {"num_cpus": 0}
    resources: dict[str, float] = {}
    for name, amount in group.bundle_specs[bundle].items():
        if name in _NAMED_RESOURCES:
            options[_NAMED_RESOURCES[name]] = amount
        else:
            resources[name] = amount
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return (
        ray.remote(Rank)
        .options(**options, resources=resources, scheduling_strategy=strategy)
        .remote()
    )
