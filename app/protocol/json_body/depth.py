"""Computes how deeply JSON is nested. Pure.

For text the depth is computed from the brackets, without parsing, chunk by chunk. Within a chunk
all work is done by C methods of ``bytes``: escapes and strings are removed, then the remaining
brackets are summed.
"""

from __future__ import annotations

import re
from itertools import accumulate
from threading import Lock
from typing import Any, Final

import orjson

MAX_DEPTH: Final = 100
"""Most levels of arrays and objects, the document itself included. Engines' own parsers stop at 128
(Rust's serde_json) or between 254 (orjson's writer) and 1,024, some with a server error."""

_QUOTE, _OPEN, _CLOSE = b'"', b"\x01", b"\xff"
_BRACKETS: Final = bytes.maketrans(b"[{]}", _OPEN * 2 + _CLOSE * 2)
_NO_BRACKETS: Final = bytes(sorted(set(range(256)) - set(b"[]{}")))
_STRUCTURE: Final = re.compile(rb'["\[\]{}]')
_FEW: Final = 512
"""Up to this many brackets are summed directly, one by one."""
_MOST_ROUNDS: Final = 4
_WRITER_LEVELS: Final = 254
"""Most levels that orjson writes."""


class TooDeep(ValueError):
    """JSON has more levels than ``MAX_DEPTH``; ``name`` is the member's name, if known."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self.name = name


def is_too_deep(body: bytes) -> bool:
    """Return whether JSON has more than ``MAX_DEPTH`` levels."""
    # Most documents do not even have that many brackets.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    plain, _ = blank_escapes(body)
    _, highest, _ = levels(brackets(plain, inside=False)[0], 0)
    return highest > MAX_DEPTH


class _Limit:
    """Checks the depth of parsed JSON with orjson's writer, which rejects more than 254 levels.

    The document is nested in enough lists to leave it ``MAX_DEPTH`` levels, and then written. That
    fails if it has more. Writing takes a fifth of the time of parsing; iterating over the values in
    Python takes longer than parsing.
    """

    def __init__(self) -> None:
        self._lists: list[Any] = []
        self._innermost = self._lists
        for _ in range(_WRITER_LEVELS - MAX_DEPTH - 1):
            inner: list[Any] = []
            self._innermost.append(inner)
            self._innermost = inner
        self._lock = Lock()

    def is_exceeded_by(self, value: Any) -> bool:
        """Return whether parsed JSON has more than ``MAX_DEPTH`` levels."""
        with self._lock:
            self._innermost.append(value)
            try:
                orjson.dumps(self._lists)
            except orjson.JSONEncodeError:
                return True
            finally:
                self._innermost.clear()
        return False


is_parsed_too_deep: Final = _Limit().is_exceeded_by


def blank_escapes(chunk: bytes) -> tuple[bytes, int]:
    """Return a chunk with its escaped backslashes and quotes replaced, and its usable length.

    The chunk must not begin inside an escape. An escape that is cut off at its end is not part of
    the usable length; the next chunk should begin with it.
    """
    if b"\\" not in chunk:
        return chunk, len(chunk)
    plain = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if plain.endswith(b"\\"):
        plain = plain[:-1]
    return plain, len(plain)


def brackets(plain: bytes, inside: bool) -> tuple[bytes, bool]:
    """Return the brackets outside strings, and whether the text ends inside a string.

    The result has 0x01 for each opening bracket and 0xff for each closing one.

    Args:
        plain: text without escaped quotes.
        inside: whether it begins inside a string.
    """
    if _QUOTE in plain:
        pieces = plain.split(_QUOTE)
        plain = b"".join(pieces[inside::2])
        inside ^= len(pieces) % 2 == 0
    elif inside:
        return b"", True
    return plain.translate(_BRACKETS, _NO_BRACKETS), inside


def levels(found: bytes, depth: int) -> tuple[int, int, int]:
    """Return the lowest, the highest and the last depth that ``brackets`` go through.

    The highest is exact if it exceeds ``MAX_DEPTH``, and may otherwise be slightly too high.

    Args:
        found: the result of ``brackets``.
        depth: the depth before these brackets.
    """
    # Removing empty pairs changes neither the lowest nor the last depth, and the highest by one.
    short, rounds = found, 0
    while len(short) > _FEW and rounds < _MOST_ROUNDS:
        before, short = short, short.replace(_OPEN + _CLOSE, b"")
        rounds += 1
        if len(short) > len(before) // 2:
            break
    lowest, highest, last = _depths(short, depth)
    if rounds and highest + rounds > MAX_DEPTH:
        return _depths(found, depth)
    return lowest, highest + rounds, last


def _depths(found: bytes, depth: int) -> tuple[int, int, int]:
    depths = list(accumulate(memoryview(found).cast("b"), initial=depth))
    return min(depths), max(depths), depths[-1]


def first_return(plain: bytes, depth: int, inside: bool) -> tuple[int, int]:
    """Return the offset after the bracket that returns the depth to 1, and the highest depth.

    The text must contain that bracket.
    """
    highest = depth
    for found in _STRUCTURE.finditer(plain):
        sign = found.group()
        if sign == _QUOTE:
            inside = not inside
        elif not inside:
            depth += 1 if sign in b"[{" else -1
            highest = max(highest, depth)
            if depth == 1:
                return found.end(), highest
    raise AssertionError("the bracket is in the text")
