"""Frames: the encoding of one entry of a journal, readable after any crash. Pure.

A frame is one line: its checksum, its length, its kind, and JSON without line breaks.

    0f3a9c51 000252 s {"request_id":"req_…", …}

The checksum (CRC-32) covers everything after it. A segment's file has its full length from the
start; zeros follow the last frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final
from zlib import crc32

import orjson

from app.core.pricing import TokenUsage
from app.ledger.reading import NotUnderstood, load

_HEADER: Final = 18  # checksum, length and kind, each followed by a space
_MAX_BODY: Final = 0xFFFFFF


class Kind(StrEnum):
    """The kind of a frame."""

    OPEN = "o"
    """The open record of a stream that begins."""
    PROGRESS = "p"
    """The usage of an open stream so far."""
    ESTIMATE = "e"
    """As ``PROGRESS``, but the tokens are Frontline's estimate. It is a separate kind because older
    versions skip unknown kinds, but could not read a longer ``PROGRESS``."""
    DETAILED = "d"
    """As ``PROGRESS``, for usage with more than prompt, cached and generated tokens; it says itself
    whether that is an estimate. A kind of its own for the same reason."""
    SETTLED = "s"
    """A record that is final."""


_KINDS: Final = {kind.value.encode(): kind for kind in Kind}
_PROGRESS: Final = [str, int, int, int, str]
_DETAILED: Final = [*_PROGRESS, int, int, int, bool]


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame, and the offset at which the next one begins.

    The kind is ``None`` if it is unknown here, because a newer version has written it.
    """

    kind: Kind | None
    body: bytes
    end: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of an open stream.

    Attributes:
        request_id: the stream's request id.
        usage: its tokens so far.
        at: the time of the count, in UTC.
        estimated: whether the tokens are Frontline's estimate and not the engine's count.
    """

    request_id: str
    usage: TokenUsage
    at: datetime
    estimated: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of its frame."""
        if self.usage.has_extras:
            return Kind.DETAILED
        return Kind.ESTIMATE if self.estimated else Kind.PROGRESS

    def to_json(self) -> bytes:
        """Return the progress as a JSON array."""
        usage = self.usage
        tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        plain = (self.request_id, *tokens, self.at)
        if not usage.has_extras:
            return orjson.dumps(plain)
        extras = (usage.cache_write_tokens, usage.images, usage.audio_seconds)
        return orjson.dumps((*plain, *extras, self.estimated))

    @classmethod
    def of(cls, found: Frame) -> Progress:
        """Return the progress in a frame.

        Raises:
            NotUnderstood: the frame's body is no progress.
        """
        fields = load(found.body)
        types = _DETAILED if found.kind is Kind.DETAILED else _PROGRESS
        if not isinstance(fields, list) or [type(field) for field in fields] != types:
            raise NotUnderstood("it is no progress")
        request_id, prompt, cached, completion, at, *more = fields
        *extras, estimated = more or [found.kind is Kind.ESTIMATE]
        try:
            usage = TokenUsage(prompt, cached, completion, *extras)
            moment = datetime.fromisoformat(at)
        except ValueError as error:
            raise NotUnderstood(str(error)) from None
        if moment.utcoffset() != timedelta(0):
            raise NotUnderstood("times are in UTC")
        return cls(request_id, usage, moment, estimated)


def frame(kind: Kind, body: bytes) -> bytes:
    """Return a frame's bytes."""
    assert len(body) <= _MAX_BODY
    rest = b"%06x %b %b" % (len(body), kind.value.encode(), body)
    return b"%08x %b\n" % (crc32(rest), rest)


def read_frame(data: bytes, start: int) -> Frame | None:
    """Return the frame that begins at ``start``, or ``None`` if no whole frame does.

    The final line break is not checked: the checksum proves that everything else is there.
    """
    header = data[start : start + _HEADER]
    try:
        length, kind = int(header[9:15], 16), header[16:17]
    except ValueError:
        return None
    end = start + _HEADER + length + 1
    checksum = crc32(data[start + 9 : end - 1])
    if header != _header(checksum, length, kind) or len(data) < end:
        return None
    return Frame(_KINDS.get(kind), data[start + _HEADER : end - 1], end)


def _header(checksum: int, length: int, kind: bytes) -> bytes:
    return b"%08x %06x %b " % (checksum, length, kind)


@dataclass(frozen=True, slots=True)
class Segment:
    """The contents of a segment.

    Attributes:
        frames: all whole frames.
        damaged: whether unreadable bytes precede a whole frame. A frame that a killed writer left
            incomplete follows all whole frames, and is not damage.
        whole: whether there are only whole frames. That holds for everything that a living writer
            has acknowledged.
    """

    frames: tuple[Frame, ...]
    damaged: bool
    whole: bool


def read_segment(data: bytes) -> Segment:
    """Return all whole frames of a segment, whatever bytes are between them."""
    frames: list[Frame] = []
    place, skipped, damaged = 0, False, False
    while 0 <= place < len(data):
        found = read_frame(data, place)
        if found is None:
            # The next frame, if there is one, follows a line break.
            skipped = True
            place = data.find(b"\n", place) + 1 or -1
        else:
            damaged = damaged or skipped
            skipped = skipped or data[found.end - 1 : found.end] != b"\n"
            frames.append(found)
            place = found.end
    return Segment(tuple(frames), damaged, whole=not skipped)
