"""Stamping a chunk as bytes, by the example of one that was parsed. Pure.

Engines send a chunk for every token, and those of a stream differ in their text and in the numbers
of their usage. So the chunk that was parsed and stamped last serves as a template: another that has
the same bytes before its text, after it, and between the numbers, comes out as that one did, with
its own text in it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson

_USAGE: Final = b',"usage":'
_DATA: Final = b"data: "
_DIGITS: Final = b"0123456789"
_KEPT: Final = 4
"""How many templates a stream has at once: a choice of ``n``, or a delta's kind, has its own."""


class _Template(NamedTuple):
    """Bytes of the engine's block around its text and its numbers, and of the client's around it.

    ``shape`` is the usage, and what follows it, without its digits.
    """

    head: bytes
    middle: bytes
    shape: bytes
    wire_head: bytes
    wire_tail: bytes


class Splicer:
    """Stamps the chunks of one stream.

    Attributes:
        usage: the ``usage`` object of the last spliced chunk, as it came, if it had one.
    """

    def __init__(self) -> None:
        self.usage: bytes | None = None
        self._templates: list[_Template] = []
        self._learned = self._spliced = 0

    def splice(self, block: bytes) -> bytes | None:
        """Return a chunk's event as the client gets it, or ``None`` where it must be parsed.

        ``block`` is the event as it came, ``data: `` and all.
        """
        for head, middle, shape, wire_head, wire_tail in self._templates:
            if not block.startswith(head):
                continue
            place = block.rfind(middle)
            text, usage = block[len(head) : place], block[place + len(middle) :]
            if (
                place >= len(head)
                # A quote may end the text, and a backslash may hide the quote that does.
                and not text.endswith(b"\\")
                and usage.translate(None, _DIGITS) == shape
            ):
                self._spliced += 1
                if shape:
                    self.usage = usage[:-1]
                return wire_head + text + wire_tail
        return None

    def learn(self, data: bytes, text: str, usage: object, event: bytes) -> None:
        """Take a chunk as a template.

        Args:
            data: the chunk as it came, without ``data: ``.
            text: what ``only_text`` finds in it.
            usage: its usage, parsed; ``None`` if it has none.
            event: what the client gets for it.
        """
        # Where no two chunks are alike, looking for templates is only work.
        if self._learned > 8 + self._spliced // 4:
            return
        self._learned += 1
        template = _template(data, text, usage, event)
        if template is not None:
            self._templates = [template, *self._templates[: _KEPT - 1]]


def only_text(chunk: dict[str, Any]) -> str | None:
    """Return the text of a chunk that says nothing but text, and does not end the answer."""
    match chunk.get("choices"):
        case [{"finish_reason": None, "delta": {**delta}}]:
            said = [value for value in delta.values() if value is not None]
        case [{"finish_reason": None, "text": said_text}]:
            said = [said_text]
        case _:
            return None
    return said[0] if len(said) == 1 and isinstance(said[0], str) else None


def _template(data: bytes, text: str, usage: object, event: bytes) -> _Template | None:
    quoted = orjson.dumps(text)
    if data.count(quoted) != 1 or event.count(quoted) != 1:
        return None
    head, _, rest = data.partition(quoted)
    wire_head, _, wire_rest = event.partition(quoted)
    head, rest, shape = head + b'"', b'"' + rest, b""
    # It might be another string, in a chunk that writes its text in another way.
    if only_text(orjson.loads(head + b"~" + rest)) != "~":
        return None
    if usage is not None:
        start = rest.rfind(_USAGE) + len(_USAGE)
        if start < len(_USAGE) or not _is(rest[start:-1], usage):
            return None
        rest, shape = rest[:start], rest[start:].translate(None, _DIGITS)
    return _Template(_DATA + head, rest, shape, wire_head + b'"', b'"' + wire_rest)


def _is(json: bytes, value: object) -> bool:
    try:
        return bool(orjson.loads(json) == value)
    except orjson.JSONDecodeError:
        return False
