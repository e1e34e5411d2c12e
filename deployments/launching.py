"""How a pool's settings become the launch of one engine: for a replica, and for who asks before."""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path
from typing import Final

from app.config import PoolSettings
from app.paths import expand_path, frontline_home
from app.plan import LaunchPlan
from app.settings import SettingsError
from deployments.engines.base import EngineAdapter, Launch, Span
from deployments.engines.registry import adapter_named
from deployments.process import EngineProcess

_RAY_THREADS: Final = "OMP_NUM_THREADS"


def make_launch(
    model_id: str,
    pool: PoolSettings,
    *,
    host: str,
    port: int,
    key: str | None = None,
    span: Span = Span(),  # noqa: B008 - frozen
) -> Launch:
    """Return the launch of a replica, or of its part on this machine; with a new key by default.

    Raises:
        SettingsError: a path names an environment variable that is not set here.
    """
    return Launch(
        model=expand_path(pool.model),
        served_name=model_id,
        host=host,
        port=port,
        slots=pool.slots,
        key=key or secrets.token_urlsafe(32),
        python=expand_path(pool.python) if pool.python else sys.executable,
        engine_args=pool.engine_args,
        span=span,
    )


async def start_engine(adapter: EngineAdapter, launch: Launch, pool: PoolSettings) -> EngineProcess:
    """Start the engine, or this node's part of it.

    Raises:
        EngineNotStarted: its command cannot be run.
        OSError: its log cannot be written.
    """
    inherited = dict(os.environ)
    # Ray sets it to the actor's share of CPUs, which is not the engine's.
    inherited.pop(_RAY_THREADS, None)
    rank = f".rank{launch.span.rank}" if launch.span.rank else ""
    return await EngineProcess.start(
        adapter.command(launch),
        inherited | environment(adapter, launch, pool),
        log_folder(),
        name=log_name(launch.served_name, pool) + rank,
        stop_grace_s=pool.stop_grace_s,
    )


def environment(adapter: EngineAdapter, launch: Launch, pool: PoolSettings) -> dict[str, str]:
    """Return what is set in an engine's environment besides what it inherits."""
    return adapter.environment(launch) | pool.environment


def log_folder() -> Path:
    """The folder of the engines' logs on this machine."""
    return frontline_home() / "logs"


def log_name(model_id: str, pool: PoolSettings) -> str:
    """What the names of a pool's logs begin with."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{model_id}.{pool.name}")


def plan_launch(model_id: str, pool: PoolSettings) -> LaunchPlan:
    """Return what a replica of a pool would start, as far as it is known before.

    Nothing is reserved or made: the port is 0, the key a word. Paths are expanded as on this
    machine, but for variables that are set on the replica's node alone.
    """
    adapter = adapter_named(pool.engine)
    launch = Launch(
        model=_expanded(pool.model),
        served_name=model_id,
        host="127.0.0.1",
        port=0,
        slots=pool.slots,
        key="made anew for every replica",
        # That of Ray's worker; which one that is only its node knows.
        python=_expanded(pool.python) if pool.python else "python",
        engine_args=pool.engine_args,
    )
    return LaunchPlan(
        engine=pool.engine,
        command=tuple(adapter.command(launch)),
        environment=environment(adapter, launch, pool),
        files=adapter.files(launch),
        log=f"{log_folder() / log_name(model_id, pool)}-*.log",
        priority_routes=tuple(sorted(route.value for route in adapter.priority_routes(launch))),
    )


def _expanded(path: str) -> str:
    try:
        return expand_path(path)
    except SettingsError:
        return path
