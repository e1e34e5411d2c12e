"""Tells Frontline, with each answer of an engine's server, how often its request was suspended.

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

An answer has the count in a header when it begins. Of a stream, most suspensions come later: each
new count precedes the next events as a comment (SSE), which clients other than Frontline ignore. A
request may have several sequences in the engine; the count is that of all together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from frontline_guard import Message, Send

HEADER = b"x-frontline-preemptions"
COMMENT = b": frontline-preemptions %d\n\n"
_STREAM = b"text/event-stream"


class Tally:
    """Counts how often the engine has suspended the sequences of one HTTP request."""

    def __init__(self) -> None:
        self._counts: list[Callable[[], int]] = []

    def add(self, count: Callable[[], int]) -> None:
        """Add a sequence, or several: ``count`` returns how often they were suspended so far."""
        self._counts.append(count)

    def count(self) -> int:
        """Return how often sequences were suspended so far."""
        return sum(count() for count in self._counts)


# Tasks that the engine's server starts for a request inherit it.
_current: ContextVar[Tally | None] = ContextVar("frontline_tally", default=None)


def current() -> Tally | None:
    """Return the tally of the HTTP request that this code runs for; ``None`` without one."""
    return _current.get()


def telling(send: Send) -> Send:
    """Begin the tally of an HTTP request; return a ``send`` that tells it with the answer."""
    tally = Tally()
    _current.set(tally)
    told, streams, between_events = 0, False, True

    async def tell(message: Message) -> None:
        nonlocal told, streams, between_events
        if message["type"] == "http.response.start":
            told, headers = tally.count(), list(message.get("headers", ()))
            streams = any(
                name.lower() == b"content-type" and value.startswith(_STREAM)
                for name, value in headers
            )
            message = {**message, "headers": [*headers, (HEADER, b"%d" % told)]}
        elif streams and (body := message.get("body")):
            # A server may send an event in parts; a comment is no part of one.
            if between_events and (count := tally.count()) != told:
                told = count
                message = {**message, "body": COMMENT % count + body}
            between_events = body.endswith(b"\n\n")
        await send(message)

    return tell
