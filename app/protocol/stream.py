"""Rewrites the events of an engine's stream for the client.

A chunk that matches earlier chunks of its stream is rewritten as bytes
(``app.protocol.chunk_template``). Only errors and chunks with more than text, such as the one that
finishes the answer, are parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import orjson

from app import alarms
from app.core import errors
from app.core.dialect import Route
from app.core.tier_decision import TierDecision
from app.protocol import engine_errors
from app.protocol.chunk_template import Splicer, only_text
from app.protocol.events import BROKEN_OFF, EventStamper, error_event, event_of, read_event
from app.protocol.messages import MessagesStamper, stamp_message
from app.protocol.requests import Inbound, stamp
from app.protocol.sse import DONE, Event
from app.protocol.transcripts import stamp_transcript
from app.protocol.usage import (
    NOT_BILLED,
    Count,
    Counted,
    choice_text_size,
    count_answer,
    read_usage,
    recording_used,
    text_size,
    usage_fields,
)


class StreamStamper(Protocol):
    """Converts an engine's events to the client's events."""

    ended: bool
    """Whether the stream has ended properly, or with an error that the engine reported."""
    failed: bool
    """Whether the stream has ended with an error that the engine reported."""
    broken: bool
    """Whether the engine has sent an unreadable event. Nothing after it is processed."""

    @property
    def odd_usage(self) -> bool:
        """Whether the engine has reported impossible usage, or none by the stream's end."""
        ...

    def counted(self) -> Counted:
        """Return the tokens of the stream so far."""
        ...

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        """Return the client's bytes for some events as received; possibly none yet."""
        ...

    def break_off(self) -> bytes:
        """Return the client's last bytes if the engine is lost in the middle of the stream."""
        ...


def stream_stamper(inbound: Inbound, decision: TierDecision) -> StreamStamper:
    """Return the stamper for a request's stream."""
    if inbound.route is Route.MESSAGES:
        return MessagesStamper(inbound, decision)
    if inbound.route is Route.RESPONSES:
        return ResponsesStamper(inbound, decision)
    if inbound.route is Route.TRANSCRIPTIONS:
        return TranscriptStamper(inbound, decision)
    return ChunkStamper(inbound, decision)


class ChunkStamper:
    """Stamps the chunks of chat completions and completions.

    A client that did not request usage gets it on the chunk that finishes the answer, as in
    DeepInfra's service, and no additional chunk. The finishing chunk is held back until the
    engine's usage chunk, which follows at once, has arrived. If the engine reports no usage or an
    impossible one, the client gets the billed usage instead.
    """

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        self.ended = self.failed = self.broken = False
        self._route = inbound.route
        self._wants_usage = inbound.wants_usage
        self._wants_continuous_usage = inbound.wants_continuous_usage
        self._decision = decision
        self._id: str | None = None
        self._held: dict[str, Any] | None = None
        self._images = inbound.images
        self._count = Count(
            inbound.expected_prompt_tokens, inbound.choices_per_prompt, inbound.images
        )
        # The last usage that the engine reported; `None` if it was impossible.
        self._reported: dict[str, Any] | None = None
        self._usage_shown = False
        # The fields that all chunks of the stream share.
        self._frame: dict[str, Any] = {}
        # No splicing if every chunk shows its usage, because then each has its own cost.
        self._splicer = None if self._wants_continuous_usage else Splicer()

    @property
    def odd_usage(self) -> bool:
        return self._count.odd or (self.ended and not self.failed and self._reported is None)

    def counted(self) -> Counted:
        self._take_spliced()
        return self._count.result()

    def feed(self, blocks: Sequence[bytes]) -> bytes:
        splicer, place = self._splicer, 0
        if (
            len(blocks) == 1
            and splicer is not None
            and not (self._held or self.ended or self.broken)
        ):
            spliced = splicer.splice_one(blocks[0])
            if spliced is not None:
                return spliced
        wire: list[bytes] = []
        # An error ends the stream. Later events of the engine, such as `[DONE]`, are dropped.
        while place < len(blocks) and not (self.failed or self.broken):
            # A held chunk must be sent before the next event of any kind.
            if splicer is not None and not self._held:
                place = splicer.splice(blocks, place, wire)
            if place < len(blocks) and (event := event_of(blocks[place], wire)):
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
        # An empty text also stands for a token, whose bytes come with the next.
        self._note(choices, usage, text=text is not None)
        if not self._frame:
            self._frame = {name: chunk[name] for name in _COMMON if name in chunk}
        if self._wants_usage:
            shown = None
            if usage is not None and (not choices or self._wants_continuous_usage):
                # On a choice's chunks engines report the usage of that choice.
                shown = self._reported if choices and self._reported else self._shown_usage()
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
        # With usage, deltas have the reported tokens, or one token each if that is impossible.
        size = 0 if text and usage is not None else sum(map(choice_text_size, choices))
        self._count.sent(bool(size) or text, size if usage is None else 0)

    def _take_usage(self, usage: object, choice: int | None) -> None:
        sane = self._count.told(usage, choice)
        self._reported = usage if sane and isinstance(usage, dict) else None

    def _take_spliced(self) -> None:
        splicer = self._splicer
        if splicer is None or not splicer.deltas:
            return
        for choice, raw in splicer.usages.items():
            self._take_usage(_usage_of(raw), choice)
        splicer.usages.clear()
        # The size as received: escaped text counts slightly more.
        self._count.sent(splicer.deltas, splicer.size)
        splicer.deltas = splicer.size = 0

    def _shown_usage(self) -> dict[str, Any]:
        """Return the ``usage`` object for the tokens so far."""
        counted = self.counted()
        reported = self._reported
        if reported is not None and read_usage(reported, self._images) == counted.usage:
            return reported
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
        # SGLang gives every choice its own id; in OpenAI's API a stream has one id.
        self._id = self._id or chunk.get("id")
        if self._id is not None:
            chunk["id"] = self._id
        stamp(chunk, self._decision, images=self._images)
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def break_off(self) -> bytes:
        error = error_event(errors.ServerError(BROKEN_OFF), self._route)
        return b"".join((*self._release(self._shown_usage()), error))


class TranscriptStamper(ChunkStamper):
    """Stamps the chunks of a transcript.

    Engines tell tokens on a stream, if anything, and not the seconds that are billed. The length of
    the recording is known from the beginning: see ``app.protocol.recording``.
    """

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        super().__init__(inbound, decision)
        self._splicer = None
        self._counted = recording_used(inbound.recording_s, estimated=True)

    @property
    def odd_usage(self) -> bool:
        return False

    def counted(self) -> Counted:
        return self._counted


class ResponsesStamper(EventStamper):
    """Stamps the events of the Responses route that contain the response object."""

    _LAST: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        super().__init__(inbound, decision)
        self._unreported = False
        self._sequence_number = -1

    @property
    def odd_usage(self) -> bool:
        return self._count.odd or (self._unreported and not self.failed)

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
            self._unreported = self._unreported or (last and usage is None)
            if read_usage(usage, self._images) != counted.usage:
                response["usage"] = usage_fields(counted, Route.RESPONSES)
        stamp(response, self._decision, images=self._images)

    def break_off(self) -> bytes:
        return self._error(errors.ServerError(BROKEN_OFF))

    def _error(self, error: errors.ApiError) -> bytes:
        return error_event(error, Route.RESPONSES, self._sequence_number + 1)


def _without_tokens(body: bytes, route: Route) -> bytes:
    answer = orjson.loads(body)
    if route is Route.DETOKENIZE and "prompt" not in answer:
        # SGLang's name for it; vLLM's is `prompt`.
        return orjson.dumps({**answer, "prompt": answer["text"]})
    return body


def stamp_answer(body: bytes, inbound: Inbound, decision: TierDecision) -> tuple[bytes, Counted]:
    """Return the client's body for an answer that is not streamed, and its tokens.

    Raises:
        ServerError: the answer cannot be parsed, or cannot be encoded again.
    """
    try:
        if not inbound.route.takes_slot:
            # Nothing was generated, and nothing is billed.
            return _without_tokens(body, inbound.route), NOT_BILLED
        if inbound.route is Route.TRANSCRIPTIONS:
            return stamp_transcript(body, inbound, decision)
        answer = orjson.loads(body)
        images = inbound.images
        counted = count_answer(answer, inbound.route, inbound.expected_prompt_tokens, images)
        if inbound.route is Route.MESSAGES:
            stamp_message(answer, counted, decision)
            return orjson.dumps(answer), counted
        if counted.estimated and read_usage(answer.get("usage"), images) != counted.usage:
            answer["usage"] = usage_fields(counted, inbound.route)
        stamp(answer, decision, counted.usage)
        return orjson.dumps(answer), counted
    except Exception as error:
        # Any exception, for the reason given in `read_event`.
        alarms.PROCESS.raised("unreadable answer", "an engine's answer was not passed on", error)
        raise errors.ServerError from None


def _only_choice(choices: list[dict[str, Any]]) -> int | None:
    """Return the index of a chunk's choice; ``None`` if it has none or several."""
    if len(choices) != 1:
        return None
    index = choices[0].get("index")
    return index if type(index) is int and index >= 0 else 0


def _usage_of(raw: bytes) -> object:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        # For example a number with leading zeros: it counts as impossible usage.
        return raw


_COMMON: Final = ("id", "object", "created", "model", "system_fingerprint")


def _error_event(chunk: dict[str, Any], route: Route) -> bytes:
    status = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
    status = status if isinstance(status, int) and 400 <= status < 600 else 500
    return Event(
        engine_errors.from_engine(status, orjson.dumps(chunk), route.prompt_field).body()
    ).encode()
