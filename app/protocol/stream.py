"""Stamping streams: what a client gets for the events of an engine.

A chunk that is like others of its stream is stamped as bytes (``app.protocol.chunk_template``);
only those that say more than text, such as the one that finishes the answer, and errors, are
parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import orjson

from app import alarms
from app.core import errors
from app.core.dialect import Route
from app.core.tier_decision import TierDecision
from app.protocol import engine_errors
from app.protocol.chunk_template import Splicer, only_text
from app.protocol.requests import Inbound, stamp
from app.protocol.sse import DONE, Event, parse_block
from app.protocol.usage import (
    Count,
    Counted,
    choice_text_size,
    count_answer,
    read_usage,
    text_size,
    usage_fields,
)


class StreamStamper(Protocol):
    """Turns an engine's events into those that the client gets."""

    ended: bool
    """Whether the stream has come to its proper end, or to an error that the engine reported."""
    failed: bool
    """Whether it has come to an error that the engine reported."""
    broken: bool
    """Whether the engine has sent something that cannot be read. Nothing after it is taken."""

    @property
    def odd_usage(self) -> bool:
        """Whether the engine has told usage that cannot be, or none at the stream's end."""
        ...

    def counted(self) -> Counted:
        """Return the tokens of the stream so far."""
        ...

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        """Return what the client gets for some events, as they came; perhaps nothing yet."""
        ...

    def break_off(self) -> bytes:
        """Return what the client gets when the engine is lost in the middle of the stream."""
        ...


def stream_stamper(inbound: Inbound, decision: TierDecision) -> StreamStamper:
    """Return the stamper for a request's stream."""
    if inbound.route is Route.RESPONSES:
        return ResponsesStamper(inbound, decision)
    return ChunkStamper(inbound, decision)


class ChunkStamper:
    """Stamps the chunks of chat completions and completions.

    A client that did not ask for usage gets it on the chunk that finishes the answer, as
    DeepInfra's service does, and no chunk more than it expects. That chunk is held back until
    the engine's usage chunk, which follows at once, has come. Where the engine tells no usage, or
    one that cannot be, the client gets what is billed instead.
    """

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        self.ended = self.failed = self.broken = False
        self._route = inbound.route
        self._wants_usage = inbound.wants_usage
        self._wants_continuous_usage = inbound.wants_continuous_usage
        self._decision = decision
        self._id: str | None = None
        self._held: dict[str, Any] | None = None
        self._count = Count(inbound.expected_prompt_tokens, inbound.choices_per_prompt)
        # The usage that came last, and whether it can be true.
        self._told: dict[str, Any] | None = None
        self._usage_shown = False
        # What the chunks of the stream have in common.
        self._frame: dict[str, Any] = {}
        # Where every chunk shows its usage, each has a cost of its own, too.
        self._splicer = None if self._wants_continuous_usage else Splicer()

    @property
    def odd_usage(self) -> bool:
        return self._count.odd or (self.ended and not self.failed and self._told is None)

    def counted(self) -> Counted:
        self._take_spliced()
        return self._count.result()

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        wire: list[bytes] = []
        splicer, place = self._splicer, 0
        # An error ends the stream: what the engine sends after it, such as `[DONE]`, is dropped.
        while place < len(blocks) and not (self.failed or self.broken):
            # One that is held leaves before the next, whichever that is.
            if splicer is not None and not self._held:
                place = splicer.splice(blocks, place, wire)
            if place < len(blocks) and (event := parse_block(blocks[place])):
                self.broken = not read_event(self._parsed, event, wire)
            place += 1
        return b"".join(wire)

    def _parsed(self, event: Event) -> Iterator[bytes]:
        if event.data == DONE:
            yield from self._end()
            self.ended = True
            yield event.encode()
            return
        chunk = orjson.loads(event.data)
        if chunk.get("error") is not None:
            self.ended = self.failed = True
            yield from self._release(self._shown_usage())
            yield _error_event(chunk, self._route)
            return
        text, usage = only_text(chunk), chunk.get("usage")
        wire = list(self._chunk(chunk, text))
        if self._splicer is not None and text is not None and len(wire) == 1:
            choice = _only_choice(chunk["choices"])
            self._splicer.learn(event.data, text, usage, wire[0], choice or 0)
        yield from wire

    def _chunk(self, chunk: dict[str, Any], text: str | None) -> Iterator[bytes]:
        choices, usage = chunk.get("choices") or [], chunk.pop("usage", None)
        # An empty text stands for a token, too: its bytes come with the next.
        self._note(choices, usage, text=text is not None)
        if not self._frame:
            self._frame = {name: chunk[name] for name in _COMMON if name in chunk}
        if self._wants_usage:
            shown = None
            if usage is not None and (not choices or self._wants_continuous_usage):
                # Engines tell each choice's own on its chunks.
                shown = self._told if choices and self._told else self._shown_usage()
                self._usage_shown = not choices
            yield self._stamped(chunk, {"usage": shown})
        elif choices:
            yield from self._release(None)
            if any(choice.get("finish_reason") is not None for choice in choices):
                self._held = chunk
            else:
                yield self._stamped(chunk, {})
        elif usage is None:
            yield self._stamped(chunk, {})

    def _note(self, choices: list[dict[str, Any]], usage: object, *, text: bool) -> None:
        self._take_spliced()
        if usage is not None:
            self._take_usage(usage, _only_choice(choices))
        # Where usage comes with them, deltas are told or, if that cannot be, one token each.
        size = 0 if text and usage is not None else sum(map(choice_text_size, choices))
        self._count.sent(bool(size) or text, size if usage is None else 0)

    def _take_usage(self, usage: object, choice: int | None) -> None:
        sane = self._count.told(usage, choice)
        self._told = usage if sane and isinstance(usage, dict) else None

    def _take_spliced(self) -> None:
        splicer = self._splicer
        if splicer is None or not splicer.deltas:
            return
        for choice, raw in splicer.usages.items():
            self._take_usage(_usage_of(raw), choice)
        splicer.usages.clear()
        # As they came: what is escaped counts a little more.
        self._count.sent(splicer.deltas, splicer.size)
        splicer.deltas = splicer.size = 0

    def _shown_usage(self) -> dict[str, Any]:
        """Return the ``usage`` object that tells the tokens so far."""
        counted = self.counted()
        if self._told is not None and read_usage(self._told) == counted.usage:
            return self._told
        return usage_fields(counted, self._route)

    def _end(self) -> Iterator[bytes]:
        yield from self._release(self._shown_usage())
        if self._wants_usage and not self._usage_shown and self._frame:
            yield self._stamped({**self._frame, "choices": []}, {"usage": self._shown_usage()})

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
        return b"".join((*self._release(self._shown_usage()), error))


class ResponsesStamper:
    """Stamps the events of the Responses route: each that carries the response object."""

    _LAST: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        self.ended = self.failed = self.broken = False
        self._count = Count(inbound.expected_prompt_tokens)
        self._untold = False
        self._decision = decision
        self._sequence_number = -1

    @property
    def odd_usage(self) -> bool:
        return self._count.odd or (self._untold and not self.failed)

    def counted(self) -> Counted:
        return self._count.result()

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        wire: list[bytes] = []
        for block in blocks:
            # As above.
            if self.failed or self.broken:
                break
            if event := parse_block(block):
                self.broken = not read_event(self._stamped, event, wire)
        return b"".join(wire)

    def _stamped(self, event: Event) -> Iterator[bytes]:
        if event.data == DONE:
            self.ended = True
            yield event.encode()
            return
        fields = orjson.loads(event.data)
        self._sequence_number = fields.get("sequence_number", self._sequence_number)
        kind = fields.get("type")
        if kind == "error" or "error" in fields:
            self.ended = self.failed = True
            yield self._error(errors.ServerError())
            return
        last, response = kind in self._LAST, fields.get("response")
        if isinstance(response, dict):
            self._stamp(response, last=last)
            wire = Event(orjson.dumps(fields), event.name).encode()
        else:
            if isinstance(delta := fields.get("delta"), str):
                self._count.sent(1, text_size(delta))
            wire = event.encode()
        self.ended = self.ended or last
        self.failed = self.failed or kind == "response.failed"
        yield wire

    def _stamp(self, response: dict[str, Any], *, last: bool) -> None:
        usage = response.get("usage")
        self._count.told(usage)
        if last or usage is not None:
            counted = self._count.result()
            self._untold = self._untold or (last and usage is None)
            if read_usage(usage) != counted.usage:
                response["usage"] = usage_fields(counted, Route.RESPONSES)
        stamp(response, self._decision)

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


def stamp_answer(body: bytes, inbound: Inbound, decision: TierDecision) -> tuple[bytes, Counted]:
    """Return what a client gets for an answer that came whole, and its tokens.

    Raises:
        ServerError: it cannot be read, or cannot be written again.
    """
    try:
        answer = orjson.loads(body)
        counted = count_answer(answer, inbound.route, inbound.expected_prompt_tokens).result()
        if counted.estimated and read_usage(answer.get("usage")) != counted.usage:
            answer["usage"] = usage_fields(counted, inbound.route)
        stamp(answer, decision, counted.usage)
        return orjson.dumps(answer), counted
    except Exception as error:
        # As of events.
        alarms.PROCESS.raised("unreadable answer", "an engine's answer was not passed on", error)
        raise errors.ServerError from None


def read_event(read: Callable[[Event], Iterator[bytes]], event: Event, wire: list[bytes]) -> bool:
    """Add what a client gets for an event, and return whether it could be read."""
    try:
        wire.extend(read(event))
    except Exception as error:
        # Engines can send anything: no JSON, no object, a nesting that nobody can write.
        alarms.PROCESS.raised("unreadable event", "an engine's stream was broken off", error)
        return False
    return True


def _only_choice(choices: list[dict[str, Any]]) -> int | None:
    """Return the index of a chunk's choice; ``None`` where there is none, or several."""
    if len(choices) != 1:
        return None
    index = choices[0].get("index")
    return index if type(index) is int and index >= 0 else 0


def _usage_of(raw: bytes) -> object:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        # Such as a number with zeros in front: it is taken for one that cannot be.
        return raw


_COMMON: Final = ("id", "object", "created", "model", "system_fingerprint")
_BROKEN_OFF: Final = "The engine was lost before the answer was complete."


def _error_event(chunk: dict[str, Any], route: Route) -> bytes:
    status = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
    status = status if isinstance(status, int) and 400 <= status < 600 else 500
    return Event(
        engine_errors.from_engine(status, orjson.dumps(chunk), route.prompt_field).body()
    ).encode()
