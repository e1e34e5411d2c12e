"""Sends the events of a stream to its client as they arrive, without a task for each of them.

A request's task waits below some 25 coroutines: Serve's, the server's and our own. All of them are
resumed whenever the task is. So an event is processed where it is received, in the callback of the
connection to the engine, and the task goes on only where something has to be waited for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from contextvars import copy_context
from functools import partial
from typing import Any

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
        self._unfinished: Unfinished | None = None

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
                await self._written(self._reply.write(piece))
                continue
            await answer.pass_on(self._take)
            if self._is_over():
                return self._last
            if self._unfinished is not None:
                unfinished, self._unfinished = self._unfinished, None
                await self._written(unfinished)

    def _is_over(self) -> bool:
        return self._stamper.ended or self._stamper.broken

    def _arrived(self) -> bytes:
        blocks = self._answer.arrived()
        if not blocks:
            return b""
        piece = self._stamper.feed(blocks)
        self._meter.progress(len(blocks))
        return piece

    async def _written(self, write: Awaitable[None]) -> None:
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
        self._unfinished = self._context.run(begin, self._reply.write(piece))
        return self._unfinished is not None


class Unfinished:
    """What is left of an awaitable that has begun, to be awaited by a task."""

    __slots__ = ("_steps", "_waits_for")

    def __init__(self, steps: Generator[Any, Any, None], waits_for: Any) -> None:
        self._steps, self._waits_for = steps, waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                came = yield waits_for
            except BaseException as error:
                # Such as the task's cancellation, which is for what was begun to handle.
                step = partial(self._steps.throw, error)
            else:
                step = partial(self._steps.send, came)
            try:
                waits_for = step()
            except StopIteration:
                return


def begin(awaitable: Awaitable[None]) -> Unfinished | None:
    """Run an awaitable until it waits for something; return the rest, or ``None`` if it is done."""
    steps = awaitable.__await__()
    try:
        return Unfinished(steps, next(steps))
    except StopIteration:
        return None
