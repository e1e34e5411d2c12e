"""One HTTP request and its answer, over ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from deployments.simulator.wire import Headers

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON: Final = b"application/json"
_STREAM_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


class HttpExchange:
    """One request and its answer."""

    __slots__ = ("_receive", "_send", "headers", "path", "raw_headers", "started", "wrote")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers: Headers = dict(self.raw_headers)
        self.started = self.wrote = False
        self._receive, self._send = receive, send

    async def body(self) -> bytes:
        """Return the request's body."""
        message = await self._receive()
        pieces: list[bytes] = [message.get("body", b"")]
        while message.get("more_body"):
            message = await self._receive()
            pieces.append(message.get("body", b""))
        return b"".join(pieces)

    async def gone(self) -> None:
        """Return when the client has disconnected or its answer is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, body: bytes = b"", kind: bytes = JSON) -> None:
        """Send a whole answer."""
        length = (b"content-length", b"%d" % len(body))
        headers = [length, (b"content-type", kind)] if body else [length]
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self) -> None:
        """Send the head of a stream, once."""
        if not self.started:
            self.started = True
            await self._send(_STREAM_START)

    async def write(self, data: bytes, more: bool = True) -> None:
        """Send a piece of a stream."""
        if not self.started:
            await self.start_stream()
        self.wrote = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
