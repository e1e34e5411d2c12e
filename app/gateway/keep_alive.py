"""Keeps the connection to a stream's client open while the engine sends nothing.

Load balancers and proxies close a connection without traffic, many of them after 30 or 60 seconds.
A placed stream may be silent for longer: before its first token, and while the engine has suspended
it for a request of a better tier. SSE comments, which clients skip, are traffic.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from app import supervision
from app.config.ingress import IngressSettings
from app.gateway.metering import Meter
from app.gateway.response import SSE, Placement, Reply

COMMENT: Final = b": keep-alive\n\n"
"""What vLLM sends, too."""


class Suspicion:
    """Watches an answer that may be suspended; implements ``app.upstream.silence.Silence``.

    Such an answer is not broken off after a long silence. Its replica is suspected instead, and the
    Model finds out whether the engine hangs.

    Args:
        silent_s: after so many seconds of silence the replica is suspected, again and again.
        suspect: reports the replica if it has sent nothing to any request.
    """

    def __init__(self, silent_s: float, suspect: Callable[[], None]) -> None:
        self.due = False
        self._silent_s = silent_s
        self._suspect = suspect
        self._suspected_at = -math.inf

    def look(self, received_at: float, now: float) -> float:
        """See ``Silence.look``."""
        at = max(received_at, self._suspected_at) + self._silent_s
        if at <= now:
            self._suspected_at, at = now, now + self._silent_s
            self._suspect()
        return at

    async def handle(self) -> None:
        """Do nothing: an answer that is not streamed has no comments."""

    async def pass_on(self, comments: bytes) -> None:
        """Do nothing, as above."""


class KeepAlive:
    """Sends comments while the engine is silent; implements ``app.upstream.silence.Silence``.

    The first comment begins the answer: its status and its tier are then final. The replica of a
    stream that may be suspended is suspected after ``stream_timeout_s`` of silence.

    Args:
        reply: the connection to the client.
        meter: the request's record, which must be durable before the answer begins.
        place: where the request was placed, for the headers.
        settings: the settings in force for the request.
        suspect: reports the replica if it has sent nothing to any request.
        now: the event loop's clock, in seconds.
    """

    def __init__(
        self,
        reply: Reply,
        meter: Meter,
        place: Placement,
        settings: IngressSettings,
        suspect: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        self.due = False
        self._reply = reply
        self._meter = meter
        self._place = place
        self._comment_s = settings.stream_comment_s
        silent_s = settings.stream_timeout_s if place.may_be_suspended else math.inf
        self._suspicion = Suspicion(silent_s, suspect)
        self._now = now
        self._begin_at = now() + settings.stream_headers_after_s
        self._sent_at = -math.inf

    def look(self, received_at: float, now: float) -> float:
        """See ``Silence.look``."""
        comment_at = self._begin_at
        if self._reply.started:
            comment_at = max(received_at, self._sent_at) + self._comment_s
        self.due = self.due or comment_at <= now
        # The answer may begin at any time. Then the next comment is due no sooner than this.
        soonest = now + self._comment_s
        comment_at = soonest if self.due else min(comment_at, soonest)
        return min(comment_at, self._suspicion.look(received_at, now))

    async def handle(self) -> None:
        """Begin the answer if it has not begun, and send a comment.

        Raises:
            DiskRefuses: the opening record is not durable. Nothing has been sent.
        """
        self.due = False
        if not self._reply.started:
            await self._meter.durable()
            await self._reply.start(SSE, self._place)
        await self._send(COMMENT)

    async def pass_on(self, comments: bytes) -> None:
        """Send the engine's comments; before the answer has begun, drop them."""
        if self._reply.started:
            await self._send(comments)
        elif self._now() >= self._begin_at:
            await self.handle()

    async def _send(self, comments: bytes) -> None:
        self._sent_at = self._now()
        if not self._reply.ended:
            await self._reply.write(comments)


@asynccontextmanager
async def comments_meanwhile(reply: Reply, comment_s: float) -> AsyncIterator[None]:
    """Keep a stream that has begun alive while it waits in the queue for another replica."""
    if not reply.started:
        # The client may still get an error with its own status.
        yield
        return

    async def send() -> None:
        while True:
            await asyncio.sleep(comment_s)
            await reply.write(COMMENT)

    task = supervision.run_once("keep alive", send)
    try:
        yield
    finally:
        await supervision.stop(task)
