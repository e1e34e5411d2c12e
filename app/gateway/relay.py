"""Sends the events of a stream to its client as they arrive, without a task for each of them.

A request's task waits below some 25 coroutines: Serve's, the server's and our own. All of them are
resumed whenever the task is. So an event is processed where it is received, in the callback of the
connection to the engine, and the task goes on only where something has to be waited for.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextvars import copy_context

from app.core.unfinished import Finished, Unfinished, begin
from app.gateway.metering import Meter
from app.gateway.response import Reply
from app.protocol.stream import StreamStamper
from app.upstream.client import StreamedAnswer


class Relay:
    """Sends the events of one stream, up to its last.

    Attributes:
        writing: whether the client has to read before the next piece can be written.
    """

    def __init__(
        self, answer: StreamedAnswer, stamper: StreamStamper, meter: Meter, reply: Reply
    ) -> None:
        self.writing = False
        self._answer = answer
        self._stamper = stamper
        self._meter = meter
        self._reply = reply
        # What a server or a middleware may have set for the request's task.
        self._context = copy_context()
        self._last = b""
        self._unfinished: Unfinished[None] | None = None

    async def until_last(self) -> bytes:
        """Send what arrives; return the client's last bytes, unsent.

        They are the last if the stamper says so, or if the engine has sent the whole answer.

        Raises:
            EngineBroke: the connection ended before the HTTP message did.
        """
        answer = self._answer
        while True:
            piece = self._arrived()
            if answer.complete or self._is_over():
                return piece
            if piece:
                await self.write(piece)
                continue
            await answer.pass_on(self._take)
            if self._is_over():
                return self._last
            if self._unfinished is not None:
                unfinished, self._unfinished = self._unfinished, None
                await self._wait(unfinished)

    def _is_over(self) -> bool:
        return self._stamper.ended or self._stamper.broken

    def _arrived(self) -> bytes:
        blocks = self._answer.arrived()
        if not blocks:
            return b""
        piece = self._stamper.feed(blocks)
        self._meter.progress(len(blocks))
        return piece

    async def write(self, piece: bytes, *, more: bool = True) -> None:
        """Send a piece of the stream, and wait until it is written."""
        await self._wait(self._reply.write(piece, more=more))

    async def _wait(self, write: Awaitable[None]) -> None:
        self.writing = True
        await write
        self.writing = False

    def _take(self) -> bool:
        """Send what has arrived; return whether the task has to go on."""
        piece = self._arrived()
        if self._is_over():
            self._last = piece
            return True
        if not piece:
            return False
        begun = self._context.run(begin, self._reply.write(piece))
        if isinstance(begun, Finished):
            return False
        self._unfinished = begun
        return True
