"""Server-sent events to one browser, which may leave or stop reading at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

READS_WITHIN_S: Final = 10.0
"""How long a browser may leave what was sent unread. Then its connection is closed, because it
would hold up the end of an ingress that is being replaced."""
LONGEST_S: Final = 60.0
"""How long one stream lasts. An ingress that is being replaced waits for the streams that it has
begun; a browser goes on at another one as soon as its stream ends."""
_AGAIN_MS: Final = 1000
_FIRST: Final = f"retry: {_AGAIN_MS}\n\n".encode()


class EventStream(Response):
    """An answer of server-sent events.

    Args:
        events: whole events, encoded.
        goes_on: asked before each event; the answer ends when it returns false.
        end: called once the answer has ended, however it did.
        longest_s: how long it lasts at most, in seconds.
        reads_within_s: how long the browser may leave what was sent unread, in seconds.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        goes_on: Callable[[], bool],
        end: Callable[[], None],
        *,
        longest_s: float = LONGEST_S,
        reads_within_s: float = READS_WITHIN_S,
    ) -> None:
        # Without the second header, proxies such as nginx buffer a stream.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._goes_on = goes_on
        self._end = end
        self._longest_s = longest_s
        self._reads_within_s = reads_within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._until_left, receive, group.cancel_scope)
                await self._answer(send)
                group.cancel_scope.cancel()
        finally:
            self._end()

    async def _until_left(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _answer(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._write(send, _FIRST)
            async with asyncio.timeout(self._longest_s):
                async for event in self._events:
                    if not self._goes_on():
                        break
                    await self._write(send, event)
        except TimeoutError:
            pass
        except _NotRead:
            # The server closes the connection of an answer that does not end.
            return
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, piece: bytes, *, more: bool = True) -> None:
        with anyio.move_on_after(self._reads_within_s) as patience:
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        if patience.cancelled_caught:
            raise _NotRead


class _NotRead(Exception):
    """The browser does not read."""
