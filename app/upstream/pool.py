"""The pool of connections to engines: keeps and reuses them, and replaces stale ones."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from app.protocol.json_body.spliced import JSON_TYPE, Spliced
from app.upstream.http1 import (
    Body,
    ConnectionLost,
    EngineConnection,
    Response,
    request_head,
)
from app.upstream.silence import Silence

CONNECT_TIMEOUT_S: Final = 5.0
# Below the five seconds after which uvicorn, the server of the engines, closes an idle connection:
# the side that writes next must close first.
KEEPALIVE_S: Final = 3.0
_LONGEST_PAUSE_S: Final = 300.0


class Connections:
    """The connections of one ingress to the engines of all its models."""

    def __init__(self) -> None:
        # Bounded by the number of concurrent requests, which the engines' slots bound.
        self._idle: dict[str, deque[EngineConnection]] = {}
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None

    async def take(self, base_url: str) -> EngineConnection:
        """Return an idle or a new connection to an engine.

        Raises:
            ConnectionLost: no connection can be opened.
        """
        idle = self._idle.get(base_url)
        while idle:
            # The most recently used one, so that surplus connections become old enough to close.
            connection = idle.pop()
            if connection.reusable:
                return connection
            connection.close()
        return await _connect(base_url)

    async def send(
        self,
        base_url: str,
        head: bytes,
        body: Body,
        read_timeout_s: float,
        silence: Silence | None = None,
    ) -> tuple[EngineConnection, Response]:
        """Send a request; return its connection, which must be given back, and its answer.

        If the engine closes a kept connection before it sends a byte, the request is sent once more
        on a new one. Nothing was received, so at worst the engine computes an answer in vain.

        Raises:
            ConnectionLost: as in ``take`` and ``EngineConnection.send``.
        """
        connection = await self.take(base_url)
        try:
            return connection, await _sent(connection, head, body, read_timeout_s, silence)
        except ConnectionLost as lost:
            if not lost.stale:
                raise
        # Other kept connections are probably stale too.
        connection = await _connect(base_url)
        return connection, await _sent(connection, head, body, read_timeout_s, silence)

    def give_back(self, base_url: str, connection: EngineConnection) -> None:
        """Keep a connection for another request, or close it if its answer has not ended."""
        if not connection.reusable:
            connection.close()
            return
        connection.unwatch()
        connection.kept = True
        connection.idle_since = self._loop.time()
        self._idle.setdefault(base_url, deque()).append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEPALIVE_S / 4, self._sweep)

    def close(self) -> None:
        """Close the idle connections."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    def _sweep(self) -> None:
        """Close connections that have been idle for 3/4 of ``KEEPALIVE_S``."""
        oldest = self._loop.time() - KEEPALIVE_S * 3 / 4
        for base_url, idle in list(self._idle.items()):
            while idle and idle[0].idle_since < oldest:
                idle.popleft().close()
            if not idle:
                del self._idle[base_url]
        again = bool(self._idle)
        self._sweeper = self._loop.call_later(KEEPALIVE_S / 4, self._sweep) if again else None


async def fetch(
    base_url: str,
    method: str,
    path: str,
    *,
    key: str | None = None,
    json: bytes | Spliced | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Send one request over a new connection; return the answer's status and body.

    Args:
        base_url: the engine's URL, without a trailing slash.
        method: the HTTP method.
        path: the path, with its leading slash.
        key: a bearer token.
        json: the body; ``Spliced`` says itself what it is.
        headers: further headers.

    Raises:
        ConnectionLost: no connection can be opened, it ended before the answer did, or nothing
            arrived for five minutes.
    """
    head = request_head(method, path, base_url, key) + b"connection: close\r\n"
    head += b"".join(f"{name}: {value}\r\n".encode() for name, value in (headers or {}).items())
    if json is not None:
        kind = json.content_type if isinstance(json, Spliced) else JSON_TYPE
        head += b"content-type: %b\r\ncontent-length: %d\r\n" % (kind, len(json))
    connection = await _connect(base_url)
    try:
        response = await connection.send(head + b"\r\n", json or b"", _LONGEST_PAUSE_S)
        return response.status, await response.read()
    finally:
        connection.close()


async def _sent(
    connection: EngineConnection,
    head: bytes,
    body: Body,
    read_timeout_s: float,
    silence: Silence | None,
) -> Response:
    """Send a request; close the connection unless the head of an answer arrives."""
    try:
        return await connection.send(head, body, read_timeout_s, silence)
    except BaseException:
        connection.close()
        raise


async def _connect(base_url: str) -> EngineConnection:
    url = urlsplit(base_url)
    if url.scheme != "http" or url.hostname is None:
        raise ConnectionLost(f"not an HTTP address: {base_url}")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                EngineConnection, url.hostname, url.port or 80
            )
    except (OSError, TimeoutError) as error:
        raise ConnectionLost(str(error)) from error
    return connection
