"""An engine that is larger than a node: its parts on the other nodes, and their common fate.

An engine replica whose pool says ``nodes: 2`` runs one engine on two nodes. Serve reserves a
placement group for each such replica (``placement_group_bundles``): the replica itself, with the
engine's first part, takes the first bundle, and an actor of its own for each further part takes one
of the others. Whatever ends, engine process, actor or node, ends the whole: parts that wait for one
that has gone wait for ever, and hold their GPUs meanwhile.
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
    """A part of an engine on another node has ended, or does not answer."""


class RankFailedToStart(RuntimeError):
    """A part of an engine cannot be placed, or did not start."""


def node_address() -> str:
    """This node's address, as Ray has it."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def lead(pool: PoolSettings) -> tuple[NodeSpan, ReservedPort | None]:
    """Return the span of a replica whose engine's first part is here, and its meeting place."""
    if pool.nodes == 1:
        return NodeSpan(), None
    here = node_address()
    port = reserve_port(here)
    return NodeSpan(pool.nodes, 0, here, here, port.port), port


class Rank:
    """The actor of one further part of an engine, on the node that the part runs on."""

    async def start(self, model_id: str, pool: PoolSettings, key: str, span: NodeSpan) -> None:
        """Start this node's part of the engine.

        Raises:
            SettingsError: one of the pool's paths has no meaning on this node.
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
        """Return, once it has ended, what its log ends with."""
        status = await self._process.wait()
        return f"status {status}; its last lines:\n{self._process.tail()}"

    async def answer(self) -> None:
        """Return at once."""

    async def stop(self) -> None:
        """End this part and return when nothing of it is left."""
        await self._process.stop()


class OtherRanks:
    """The further parts of one engine, as the replica that owns them sees them."""

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
            model_id: the model's.
            pool: the pool's settings.
            key: the engine's.
            span: that of the first part.
            on_end: called, once, when one of them has ended, for whatever reason.

        Raises:
            RankFailedToStart: there is no bundle for each part, or one could not be started.
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

    @property
    def alive(self) -> bool:
        """Whether all run, as far as has been heard."""
        return self._problem is None

    def check(self) -> None:
        """Raise RankEnded if one of them has ended or does not answer."""
        if self._problem is not None:
            raise RankEnded(self._problem)

    async def check_answers(self, timeout_s: float) -> None:
        """Check that all are there.

        Raises:
            RankEnded: one of them is not, or does not answer in time.
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
        """End all of them."""
        await supervision.stop(*self._watchers)
        # Whichever has gone already, its process has too: its reaper saw to that.
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
    """Return an actor that has all of a bundle, so that it sees the bundle's GPUs."""
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
