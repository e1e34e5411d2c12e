"""Builds the launch of one engine from a pool's settings, to start it or only to show it."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from app.config.model import PoolSettings
from app.contracts.findings import Examination
from app.contracts.launch import LaunchPlan, OpenPort, RankPlan
from app.core.paths import expand_path, frontline_home
from app.core.settings import SettingsError
from app.core.trace_variables import traces_are_on, traces_endpoint
from deployments.engines.base import EngineAdapter, Launch, NodeSpan
from deployments.engines.lora import LoraAdapter, LoraRoom, read_lora
from deployments.engines.registry import adapter_named
from deployments.hosting.guard import LOOPBACK, plan_guard
from deployments.preflight.gather import examination_failed, examine_pool
from deployments.process.supervisor import EngineProcess

# Set for the Ray actor only: the first is its share of CPUs, the second is tuned for an ingress.
_NOT_INHERITED: Final = ("OMP_NUM_THREADS", "MALLOC_ARENA_MAX")
_MODULES: Final = "PYTHONPATH"
_ROOT: Final = Path(__file__).resolve().parents[2]
_MEETING_PLACE: Final = OpenPort(
    name="meeting place",
    where="NODE_0; once they have met, the parts open more ports to each other, by torch's choice",
    lets_in="whoever reaches it: torch asks for no key",
)


def make_launch(
    model_id: str,
    pool: PoolSettings,
    *,
    host: str,
    port: int,
    key: str | None = None,
    span: NodeSpan = NodeSpan(),  # noqa: B008 - frozen
) -> Launch:
    """Return the launch of a replica, or of its part on this machine.

    ``key`` is the engine's secret; by default a new one is generated.

    Raises:
        SettingsError: a path names an environment variable that is not set here, or a variable for
            traces has a value that is not supported.
    """
    return Launch(
        model=expand_path(pool.model),
        served_name=model_id,
        host=host,
        port=port,
        slots=pool.most_slots,
        key=key or secrets.token_urlsafe(32),
        python=expand_path(pool.python) if pool.python else sys.executable,
        engine_args=pool.engine_args,
        span=span,
        preemption=pool.preemption,
        loras=tuple(read_lora(one.name, expand_path(one.path)) for one in pool.adapters),
        lora_room=LoraRoom(pool.adapter_room, pool.adapter_rank),
        traces=_traces(os.environ | pool.environment, span.rank),
    )


def _traces(variables: Mapping[str, str], rank: int) -> str:
    """Return where an engine sends its spans: where the variables say, as for an ingress."""
    # The other parts of an engine answer no requests.
    return traces_endpoint(variables) if not rank and traces_are_on(variables) else ""


def fitted(launch: Launch, found: Examination) -> Launch:
    """Return a launch that sends spans only if the engine's environment can.

    Without the packages, an engine that is told to send spans does not start. Nothing found counts
    as without.
    """
    return launch if found.exports_spans else replace(launch, traces="")


async def start_engine(adapter: EngineAdapter, launch: Launch, pool: PoolSettings) -> EngineProcess:
    """Start the engine, or this node's part of it.

    Raises:
        EngineNotStarted: its command cannot be run.
        OSError: its log cannot be written.
    """
    inherited = {name: v for name, v in os.environ.items() if name not in _NOT_INHERITED}
    # Torch keeps compiled code in the temporary folder, which goes with each engine.
    inherited.setdefault("TORCHINDUCTOR_CACHE_DIR", str(frontline_home() / "cache" / "inductor"))
    return await EngineProcess.start(
        adapter.command(launch),
        inherited | environment(adapter, launch, pool, inherited),
        log_folder(),
        name=log_name(launch.served_name, pool, launch.span.rank),
        stop_grace_s=pool.stop_grace_s,
    )


def environment(
    adapter: EngineAdapter,
    launch: Launch,
    pool: PoolSettings,
    inherited: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Return the environment variables that an engine gets in addition to inherited ones."""
    own = adapter.environment(launch)
    merged = own | pool.environment
    if path := own.get(_MODULES):
        # Images and operators set it as well, for modules that the engine needs.
        rest = pool.environment.get(_MODULES) or _without_frontline(inherited.get(_MODULES, ""))
        merged[_MODULES] = os.pathsep.join(filter(None, (path, rest)))
    return merged


def _without_frontline(path: str) -> str:
    """Return a module path without Frontline's own folder, which would shadow engines' modules."""
    folders = path.split(os.pathsep)
    return os.pathsep.join(one for one in folders if one and Path(one) != _ROOT)


def log_folder() -> Path:
    """Return the folder of the engines' logs on this machine."""
    return frontline_home() / "logs"


def log_name(model_id: str, pool: PoolSettings, rank: int = 0) -> str:
    """Return the prefix of the names of a pool's logs."""
    part = f".rank{rank}" if rank else ""
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{model_id}.{pool.name}{part}")


def plan_launch(model_id: str, pool: PoolSettings) -> LaunchPlan:
    """Return what a replica of a pool would start, as far as it is known without starting it.

    Nothing is reserved or created. The port is 0 and the key is a placeholder; ``NODE_n`` stands
    for the address of part n's node if the engine has several. Paths are expanded with this
    machine's variables; a path whose variable is not set here stays as it is.
    """
    adapter = adapter_named(pool.engine)
    first, *others = (_planned(model_id, pool, rank) for rank in range(pool.nodes))
    return LaunchPlan(
        engine=pool.engine,
        command=tuple(adapter.command(first)),
        environment=environment(adapter, first, pool),
        files=adapter.files(first),
        log=_log_pattern(first, pool),
        priority_routes=tuple(sorted(route.value for route in adapter.priority_routes(first))),
        ranks=tuple(
            RankPlan(
                rank=launch.span.rank,
                command=tuple(adapter.command(launch)),
                environment=environment(adapter, launch, pool),
                log=_log_pattern(launch, pool),
            )
            for launch in others
        ),
        opens=(plan_guard(), *([_MEETING_PLACE] if others else [])),
    )


def examine_launch(model_id: str, pool: PoolSettings, gpus: float) -> Examination:
    """Look at this machine as if a replica of a pool were started on it.

    Args:
        model_id: the model's id.
        pool: the pool's settings.
        gpus: GPUs that Ray reserves for each node of a replica.
    """
    try:
        launch = make_launch(model_id, pool, host=LOOPBACK, port=0, key="not used")
    except SettingsError as problem:
        return examination_failed(problem)
    return examine_pool(launch, pool, gpus)


def _planned(model_id: str, pool: PoolSettings, rank: int) -> Launch:
    return Launch(
        model=_expanded(pool.model),
        served_name=model_id,
        host=LOOPBACK,
        port=0,
        slots=pool.most_slots,
        key="made anew for every replica",
        # The interpreter of Ray's worker, which is only known on its node.
        python=_expanded(pool.python) if pool.python else "python",
        engine_args=pool.engine_args,
        span=NodeSpan(pool.nodes, rank, f"NODE_{rank}", "NODE_0") if pool.nodes > 1 else NodeSpan(),
        preemption=pool.preemption,
        loras=tuple(LoraAdapter(one.name, _expanded(one.path)) for one in pool.adapters),
        lora_room=LoraRoom(pool.adapter_room, pool.adapter_rank),
        traces=_traces(pool.environment, rank),
    )


def _log_pattern(launch: Launch, pool: PoolSettings) -> str:
    return f"{log_folder() / log_name(launch.served_name, pool, launch.span.rank)}-*.log"


def _expanded(path: str) -> str:
    try:
        return expand_path(path)
    except SettingsError:
        return path
