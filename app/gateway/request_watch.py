"""Ends a request whose client has gone, or that takes too long, where Serve leaves that to it.

Serve does both itself, with three more tasks, a queue and a wait for each request, unless two
headers tell it not to. HAProxy sets these on most inference requests (``app.haproxy.config``). The
watch here reads from the client only after a moment, so a request that has ended by then takes no
task.
"""

from __future__ import annotations

import asyncio
from typing import Final

from app import supervision
from app.core import errors
from app.gateway.request_body import Headers, Receive
from app.gateway.response import Reply
from app.haproxy.config import NOT_WATCHED

BEGINS_AFTER_S: Final = 0.05
"""How much later than otherwise it may be noticed that a client has gone."""
_HEADER: Final = NOT_WATCHED[0].encode()
_VALUE: Final = NOT_WATCHED[1].encode()


def is_not_watched(headers: Headers) -> bool:
    """Return whether Serve leaves a request with these headers alone."""
    return headers.get(_HEADER) == _VALUE


class RequestWatch:
    """A context that cancels its task, while the answer has not ended, if the client disconnects.

    Its task is also cancelled after the longest time for a request. The watch reads what the client
    sends, so it begins after the whole body has been received.

    Args:
        receive: of the ASGI application.
        reply: the answer to the client.
        longest_s: the longest time for the request, in seconds; ``None`` for no limit.
    """

    __slots__ = (
        "_gone",
        "_late",
        "_longest_s",
        "_receive",
        "_reply",
        "_request",
        "_timer",
        "_watcher",
    )

    def __init__(self, receive: Receive, reply: Reply, longest_s: float | None) -> None:
        self._receive, self._reply, self._longest_s = receive, reply, longest_s
        self._request: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._gone = self._late = False

    def __enter__(self) -> None:
        self._request = asyncio.current_task()
        loop, longest_s = asyncio.get_running_loop(), self._longest_s
        # One timer at a time, because nearly every request has ended before the first.
        if longest_s is not None and longest_s < BEGINS_AFTER_S:
            self._timer = loop.call_later(longest_s, self._end_late)
        else:
            self._timer = loop.call_later(BEGINS_AFTER_S, self._begin)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    async def answer_cancelled(self) -> None:
        """Say why the task was cancelled, if no answer has begun and this has cancelled it.

        Raises:
            RequestTookTooLong: the longest time is over.
        """
        if self._reply.started:
            return
        if self._gone:
            await self._reply.gone()
        elif self._late:
            assert self._longest_s is not None
            raise errors.RequestTookTooLong(self._longest_s)

    def _begin(self) -> None:
        self._watcher = supervision.run_once("client watch", self._watch)
        if self._longest_s is not None:
            left_s = self._longest_s - BEGINS_AFTER_S
            self._timer = asyncio.get_running_loop().call_later(left_s, self._end_late)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # A server also tells of a disconnect once the answer has been sent.
        self._gone = self._cancel()

    def _end_late(self) -> None:
        self._late = self._cancel()

    def _cancel(self) -> bool:
        assert self._request is not None, "the context was entered"
        return not self._reply.ended and self._request.cancel()
