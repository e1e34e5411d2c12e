"""Rewrites chunks as bytes, with a parsed chunk as the template. Pure.

Engines send a chunk per token. The chunks of a stream differ only in their text and in the numbers
of their usage. So a chunk that was parsed and stamped serves as a template. Another chunk with the
same bytes before its text, after it and between the numbers is rewritten the same way, with its own
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import orjson

_USAGE: Final = b',"usage":'
_DATA: Final = b"data: "
_DIGITS: Final = b"0123456789"
_MANY: Final = 4
"""The smallest number of chunks that are worth processing together."""
_KEPT: Final = 4
"""How many templates a stream keeps: each choice of ``n``, or kind of delta, has its own."""


class _Template(NamedTuple):
    """The bytes around the text and the numbers, in the engine's block and in the client's event.

    ``shape`` is the usage and what follows it, without digits. ``choice`` is the index of the
    choice.
    """

    head: bytes
    middle: bytes
    shape: bytes
    wire_head: bytes
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
            for template in self._templates:
                # Chunks mostly arrive one by one; then this is not worth trying.
                many = self._all_alike and len(blocks) - place >= _MANY
                if many and (done := self._splice_all(template, blocks, place, wire)):
                    place += done
                    break
                texts = self._texts(template, blocks, place)
                if texts:
                    head, tail = template.wire_head, template.wire_tail
                    wire += (head, (tail + head).join(texts), tail)
                    self._spliced += len(texts)
                    place += len(texts)
                    break
            else:
                break
        return place

    def _splice_all(
        self, template: _Template, blocks: Sequence[bytes], place: int, wire: list[bytes]
    ) -> int:
        """Append the events of many chunks at once; return the number of chunks.

        It processes all chunks except trailing ones that do not match the template, or none if
        another one does not match. In that case it is not tried again for this stream: if kinds of
        chunks alternate, it would fail at each of them.
        """
        head, middle, shape, _, tail, choice = template
        if not blocks[place].startswith(head):
            return 0
        end = len(blocks)
        while end > place and middle not in blocks[end - 1]:
            end -= 1
        count = end - place
        if count < _MANY:
            return 0
        begins, _, numbers = zip(*[b.rpartition(middle) for b in blocks[place:end]], strict=True)
        joined = tail.join((*begins, b""))
        alike = joined.startswith(head) and joined.count(tail + head) == count - 1
        alike = alike and b"".join(numbers).translate(None, _DIGITS) == shape * count
        # As in `_texts`: a backslash may hide the quote that seems to end a text.
        if not alike or b"\\" + tail in joined:
            self._all_alike = False
            return 0
        if head != template.wire_head:
            joined = template.wire_head + joined[len(head) :]
            joined = joined.replace(tail + head, tail + template.wire_head)
        wire.append(joined)
        self.deltas += count
        if shape:
            self.usages[choice] = numbers[-1][:-1]
        else:
            self.size += sum(map(len, begins)) - count * len(head)
        self._spliced += count
        return count

    def _texts(self, template: _Template, blocks: Sequence[bytes], place: int) -> list[bytes]:
        """Return the texts of consecutive chunks, from ``place`` on, that match the template."""
        head, middle, shape = template.head, template.middle, template.shape
        begin, skip, usage, texts = len(head), len(middle), b"", list[bytes]()
        for block in islice(blocks, place, None):
            end = block.rfind(middle)
            if end < begin or not block.startswith(head):
                break
            text, numbers = block[begin:end], block[end + skip :]
            # A quote ends the text, unless a backslash escapes it.
            if text.endswith(b"\\") or numbers.translate(None, _DIGITS) != shape:
                break
            usage = numbers
            texts.append(text)
        if texts:
            self.deltas += len(texts)
            if shape:
                self.usages[template.choice] = usage[:-1]
            else:
                self.size += sum(map(len, texts))
        return texts

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
    return _Template(_DATA + head, rest, shape, wire_head + b'"', b'"' + wire_rest, choice)


def _is(json: bytes, value: object) -> bool:
    try:
        return bool(orjson.loads(json) == value)
    except orjson.JSONDecodeError:
        return False
