"""Rewrites chunks as bytes, with a parsed chunk as the template. Pure.

Engines send a chunk per token. The chunks of a stream differ only in their text and in the numbers
of their usage. So a chunk that was parsed and stamped serves as a template. Another chunk with the
same bytes before its text, after it and between the numbers is rewritten the same way, with its own
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import orjson

_USAGE: Final = b',"usage":'
_DATA: Final = b"data: "
_DIGITS: Final = b"0123456789"
_MANY: Final = 8
"""From so many chunks on it pays to try whether all are alike."""
_KEPT: Final = 4
"""How many templates a stream keeps: each choice of ``n``, or kind of delta, has its own."""


class _Template(NamedTuple):
    """The bytes around the text and the numbers, in the engine's block and in the client's event.

    ``shape`` is the usage and what follows it, without digits. ``wire_between`` stands between the
    texts of two events that follow each other. ``choice`` is the index of the choice.
    """

    head: bytes
    middle: bytes
    shape: bytes
    wire_head: bytes
    wire_between: bytes
    wire_tail: bytes
    choice: int


class Splicer:
    """Stamps the chunks of one stream.

    Attributes:
        usages: by choice, the ``usage`` object of its last spliced chunk, as received.
        deltas: how many chunks were spliced.
        size: the bytes of texts in chunks without usage, as received.
    """

    def __init__(self) -> None:
        self.usages: dict[int, bytes] = {}
        self.deltas = self.size = 0
        self._templates: list[_Template] = []
        self._learned = self._spliced = 0
        self._all_alike = True

    def splice_one(self, block: bytes) -> bytes | None:
        """Return the client's event for a chunk, or ``None`` if it must be parsed."""
        for head, middle, shape, wire_head, _, wire_tail, choice in self._templates:
            begin = len(head)
            end = block.find(middle, begin)
            if end < 0 or not block.startswith(head):
                continue
            text, numbers = block[begin:end], block[end + len(middle) :]
            # A quote ends the text, unless a backslash escapes it.
            if text.endswith(b"\\") or numbers.translate(None, _DIGITS) != shape:
                continue
            if shape:
                self.usages[choice] = numbers[:-1]
            else:
                self.size += len(text)
            self.deltas += 1
            self._spliced += 1
            return wire_head + text + wire_tail
        return None

    def splice(self, blocks: Sequence[bytes], place: int, wire: list[bytes]) -> int:
        """Append the client's events for chunks, up to the first chunk that must be parsed.

        Args:
            blocks: events as received, including ``data: ``.
            place: the index to begin at.
            wire: the list to append to.

        Returns:
            The index of the first chunk that must be parsed, or the number of blocks.
        """
        while place < len(blocks):
            many = self._all_alike and len(blocks) - place >= _MANY
            if many and (done := self._splice_alike(blocks[place:], wire)):
                place += done
                continue
            event = self.splice_one(blocks[place])
            if event is None:
                break
            wire.append(event)
            place += 1
        return place

    def _splice_alike(self, rest: Sequence[bytes], wire: list[bytes]) -> int:
        """Append the client's events for chunks of one template at once, and return how many.

        All must match, but for the last few, as at the end of an answer. If others do not, this is
        not tried again: kinds of chunks that take turns would make it fail each time.
        """
        first = rest[0]
        fitting = (
            one for one in self._templates if first.startswith(one.head) and one.middle in first
        )
        template = next(fitting, None)
        if template is None:
            return 0
        head, middle, shape, wire_head, between, tail, choice = template
        end = len(rest)
        while end and middle not in rest[end - 1]:
            end -= 1
        if end < _MANY:
            return 0
        cut = [block.rpartition(middle) for block in (rest if end == len(rest) else rest[:end])]
        begins, _, numbers = zip(*cut, strict=True)
        # A tail has the empty line between events, which no block has. So it stands only between
        # two blocks, and is followed by a head if the second begins with one.
        joined = tail.join((*begins, b""))
        alike = joined.startswith(head) and joined.count(tail + head) == end - 1
        # As in `splice_one`: a backslash may escape the quote with which a tail begins.
        alike = alike and b"\\" + tail not in joined
        if not alike or b"".join(numbers).translate(None, _DIGITS) != shape * end:
            self._all_alike = False
            return 0
        if head != wire_head:
            joined = wire_head + joined[len(head) :].replace(tail + head, between)
        wire.append(joined)
        if shape:
            self.usages[choice] = numbers[-1][:-1]
        else:
            self.size += sum(map(len, begins)) - len(head) * end
        self.deltas += end
        self._spliced += end
        return end

    def learn(self, data: bytes, text: str, usage: object, event: bytes, choice: int = 0) -> None:
        """Keep a chunk as a template.

        Args:
            data: the chunk as received, without ``data: ``.
            text: the result of ``only_text`` for it.
            usage: its parsed usage; ``None`` if it has none.
            event: the client's event for it.
            choice: the index of its choice.
        """
        # If the chunks of a stream do not match each other, templates cost more than they save.
        if self._learned > 8 + self._spliced // 4:
            return
        self._learned += 1
        template = _template(data, text, usage, event, choice)
        if template is not None:
            self._templates = [template, *self._templates[: _KEPT - 1]]


def only_text(chunk: dict[str, Any]) -> str | None:
    """Return the text of a chunk that contains only text and does not end the answer."""
    match chunk.get("choices"):
        case [{"finish_reason": None, "delta": {**delta}}]:
            said = [value for value in delta.values() if value is not None]
        case [{"finish_reason": None, "text": said_text}]:
            said = [said_text]
        case _:
            return None
    return said[0] if len(said) == 1 and isinstance(said[0], str) else None


def _template(data: bytes, text: str, usage: object, event: bytes, choice: int) -> _Template | None:
    quoted = orjson.dumps(text)
    if data.count(quoted) != 1 or event.count(quoted) != 1:
        return None
    head, _, rest = data.partition(quoted)
    wire_head, _, wire_rest = event.partition(quoted)
    head, rest, shape = head + b'"', b'"' + rest, b""
    # The match might be another string, if the chunk encodes its text differently.
    if only_text(orjson.loads(head + b"~" + rest)) != "~":
        return None
    if usage is not None:
        start = rest.rfind(_USAGE) + len(_USAGE)
        if start < len(_USAGE) or not _is(rest[start:-1], usage):
            return None
        rest, shape = rest[:start], rest[start:].translate(None, _DIGITS)
    wire_head, wire_tail = wire_head + b'"', b'"' + wire_rest
    between = wire_tail + wire_head
    return _Template(_DATA + head, rest, shape, wire_head, between, wire_tail, choice)


def _is(json: bytes, value: object) -> bool:
    try:
        return bool(orjson.loads(json) == value)
    except orjson.JSONDecodeError:
        return False
