"""Stamping streams: what a client gets for the events of an engine.

A chunk that is like others of its stream is stamped as bytes (``app.splice``); only those that say
more than text, such as the one that finishes the answer, and errors, are parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import orjson

from app import errors
from app.dialect import Route
from app.openai_api import Inbound, read_usage, stamp
from app.pricing import TokenUsage
from app.splice import Splicer, only_text
from app.sse import DONE, Event, parse_block
from app.tiers import TierDecision


class StreamStamper(Protocol):
    """Turns an engine's events into those that the client gets."""

    ended: bool
    """Whether the stream has come to its proper end, or to an error that the engine reported."""
    failed: bool
    """Whether it has come to an error that the engine reported."""

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens of the stream so far, as far as the engine has told. Read on demand."""
        ...

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        """Return what the client gets for some events, as they came; perhaps nothing yet.

        Raises:
            orjson.JSONDecodeError: the engine has sent what is not JSON.
        """
        ...

    def break_off(self) -> bytes:
        """Return what the client gets when the engine is lost in the middle of the stream."""
        ...


def stream_stamper(inbound: Inbound, decision: TierDecision) -> StreamStamper:
    """Return the stamper for a request's stream."""
    if inbound.route is Route.RESPONSES:
        return ResponsesStamper(decision)
    return ChunkStamper(inbound, decision)


class ChunkStamper:
    """Stamps the chunks of chat completions and completions.

    A client that did not ask for usage gets it on the chunk that finishes the answer, as
    DeepInfra's service does, and no chunk more than it expects. That chunk is held back until
    the engine's usage chunk, which follows at once, has come.
    """

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        self.ended = self.failed = False
        self._route = inbound.route
        self._wants_usage = inbound.wants_usage
        self._wants_continuous_usage = inbound.wants_continuous_usage
        self._decision = decision
        self._id: str | None = None
        self._held: dict[str, Any] | None = None
        self._last_usage: dict[str, Any] | None = None
        # Where every chunk shows its usage, each has a cost of its own, too.
        self._splicer = None if self._wants_continuous_usage else Splicer()

    @property
    def usage(self) -> TokenUsage | None:
        return read_usage(self._newest_usage())

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        wire: list[bytes] = []
        splicer, place = self._splicer, 0
        # An error ends the stream: what the engine sends after it, such as `[DONE]`, is dropped.
        while place < len(blocks) and not self.failed:
            # One that is held leaves before the next, whichever that is.
            if splicer is not None and not self._held:
                place = splicer.splice(blocks, place, wire)
            if place < len(blocks) and (event := parse_block(blocks[place])):
                wire.extend(self._parsed(event))
            place += 1
        return b"".join(wire)

    def _parsed(self, event: Event) -> Iterator[bytes]:
        if event.data == DONE:
            self.ended = True
            yield from self._release(self._newest_usage())
            yield event.encode()
            return
        chunk = orjson.loads(event.data)
        if chunk.get("error") is not None:
            self.ended = self.failed = True
            yield from self._release(self._newest_usage())
            yield _error_event(chunk, self._route)
            return
        text, usage = only_text(chunk), chunk.get("usage")
        wire = list(self._chunk(chunk))
        if self._splicer is not None and text is not None and len(wire) == 1:
            self._splicer.learn(event.data, text, usage, wire[0])
        yield from wire

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        choices, usage = chunk.get("choices"), chunk.pop("usage", None)
        if usage is not None:
            self._last_usage = usage
            if self._splicer is not None:
                self._splicer.usage = None
        if self._wants_usage:
            shown = not choices or self._wants_continuous_usage
            yield self._stamped(chunk, {"usage": usage if shown else None})
        elif choices or usage is None:
            yield from self._release(None)
            if any(choice.get("finish_reason") is not None for choice in choices or ()):
                self._held = chunk
            else:
                yield self._stamped(chunk, {})

    def _newest_usage(self) -> dict[str, Any] | None:
        """The usage that came last, whether its chunk was parsed or spliced."""
        if self._splicer is not None and self._splicer.usage is not None:
            with suppress(orjson.JSONDecodeError):
                self._last_usage = orjson.loads(self._splicer.usage)
            self._splicer.usage = None
        return self._last_usage

    def _release(self, usage: dict[str, Any] | None) -> Iterator[bytes]:
        if self._held is not None:
            yield self._stamped(self._held, {"usage": usage} if usage is not None else {})
            self._held = None

    def _stamped(self, chunk: dict[str, Any], usage: dict[str, Any]) -> bytes:
        chunk |= usage
        # SGLang gives every choice an id of its own; in OpenAI's API a stream has one.
        self._id = self._id or chunk.get("id")
        if self._id is not None:
            chunk["id"] = self._id
        stamp(chunk, self._decision)
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def break_off(self) -> bytes:
        error = Event(errors.ServerError(_BROKEN_OFF).body()).encode()
        return b"".join((*self._release(self._newest_usage()), error))


class ResponsesStamper:
    """Stamps the events of the Responses route: each that carries the response object."""

    _LAST: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})

    def __init__(self, decision: TierDecision) -> None:
        self.ended = self.failed = False
        self._usage: TokenUsage | None = None
        self._decision = decision
        self._sequence_number = -1

    @property
    def usage(self) -> TokenUsage | None:
        return self._usage

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        wire: list[bytes] = []
        for block in blocks:
            # As above.
            if self.failed:
                break
            if event := parse_block(block):
                wire.append(self._stamped(event))
        return b"".join(wire)

    def _stamped(self, event: Event) -> bytes:
        if event.data == DONE:
            self.ended = True
            return event.encode()
        fields = orjson.loads(event.data)
        self._sequence_number = fields.get("sequence_number", self._sequence_number)
        kind = fields.get("type")
        if kind == "error" or "error" in fields:
            self.ended = self.failed = True
            return self._error(errors.ServerError())
        self.ended = self.ended or kind in self._LAST
        self.failed = self.failed or kind == "response.failed"
        response = fields.get("response")
        if not isinstance(response, dict):
            return event.encode()
        self._usage = stamp(response, self._decision) or self._usage
        return Event(orjson.dumps(fields), event.name).encode()

    def break_off(self) -> bytes:
        return self._error(errors.ServerError(_BROKEN_OFF))

    def _error(self, error: errors.ApiError) -> bytes:
        fields = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": self._sequence_number + 1,
        }
        return Event(orjson.dumps(fields), b"error").encode()


_BROKEN_OFF: Final = "The engine was lost before the answer was complete."


def _error_event(chunk: dict[str, Any], route: Route) -> bytes:
    status = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
    status = status if isinstance(status, int) and 400 <= status < 600 else 500
    return Event(
        errors.from_engine(status, orjson.dumps(chunk), route.prompt_field).body()
    ).encode()
