"""What the stampers of all routes share: reading events, and the event that ends a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import orjson

from app import alarms
from app.core import errors
from app.core.dialect import Route
from app.core.tier_decision import TierDecision
from app.protocol import anthropic
from app.protocol.requests import Inbound
from app.protocol.sse import Event, comments, parse_block
from app.protocol.usage import Count, Counted

BROKEN_OFF: Final = "The engine was lost before the answer was complete."


def error_body(error: errors.ApiError, route: Route, request_id: str | None = None) -> bytes:
    """Return an error as JSON, in the shape of a route's API; Anthropic's has ``request_id``."""
    return anthropic.error_body(error, request_id) if route.is_anthropic else error.body()


def error_event(error: errors.ApiError, route: Route, number: int = 0) -> bytes:
    """Return the event that ends a stream with an error; ``number``: its place in the stream."""
    if route.is_anthropic:
        return Event(error_body(error, route), b"error").encode()
    if route is not Route.RESPONSES:
        return Event(error.body()).encode()
    fields = {
        "type": "error",
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "sequence_number": number,
    }
    return Event(orjson.dumps(fields), b"error").encode()


def event_of(block: bytes, wire: list[bytes]) -> Event | None:
    """Return the event of a block, if any; append its comments to the client's bytes."""
    if comment := comments(block):
        wire.append(comment)
    return parse_block(block)


def read_event(read: Callable[[Event], Iterator[bytes]], event: Event, wire: list[bytes]) -> bool:
    """Append the client's bytes for an event; return whether the event could be read."""
    try:
        wire.extend(read(event))
    except Exception as error:
        # Engines can send anything: no JSON, no object, or nesting too deep to encode.
        alarms.PROCESS.raised("unreadable event", "an engine's stream was broken off", error)
        return False
    return True


class EventStamper(ABC):
    """What stampers share that parse each event (``app.protocol.stream.StreamStamper``)."""

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        self.ended = self.failed = self.broken = False
        self._decision = decision
        self._images = inbound.images
        self._count = Count(inbound.expected_prompt_tokens, images=inbound.images)

    def counted(self) -> Counted:
        return self._count.result()

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        wire: list[bytes] = []
        for block in blocks:
            # An error ends the stream. Later events of the engine are dropped.
            if self.failed or self.broken:
                break
            if event := event_of(block, wire):
                self.broken = not read_event(self._stamped, event, wire)
        return b"".join(wire)

    @abstractmethod
    def _stamped(self, event: Event) -> Iterator[bytes]:
        """Yield the client's bytes for an event."""
