"""Finds the top-level members of a JSON object without parsing the large ones. Pure.

Parsing a request of many megabytes creates millions of Python objects and blocks the interpreter
for seconds. The scanner processes the same bytes with C methods, one chunk at a time, and only
finds where each top-level member begins and ends. It is a generator: it yields whenever the work
since the last yield reaches ``_SLICE``, so that its caller can let other work run.

What is checked:

- UTF-8, the syntax of the object itself, its names, and every member of up to ``LONGEST_PARSED``
  bytes are checked strictly.
- For a longer member only the extent is found, from its strings, escapes and brackets. If it is
  invalid inside, the engine's parser rejects the document.

Any parser that accepts these bytes finds the same members in the same places. Nested names, escapes
in names, and repeated names cannot cause a difference.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Generator, Iterator
from typing import Any, Final, TypeVar

import orjson

from app.protocol.json_body.depth import (
    MAX_DEPTH,
    TooDeep,
    blank_escapes,
    brackets,
    first_return,
    levels,
)
from app.protocol.json_body.members import LONGEST_PARSED, ByteSpan, Members
from app.protocol.json_body.raw import RawJson

T = TypeVar("T")
Steps = Generator[None, None, T]

MOST_MEMBERS: Final = 4096
"""Most top-level members of a request. No API has nearly as many fields."""

_SLICE: Final = 64 * 1024
"""Work between two yields, in bytes of a plain string: 0.1 ms usually, 2 ms for the worst shape."""
_CHUNK: Final = 16 * 1024
"""Most bytes processed in one call. A chunk is never divided, so it also bounds a slice."""
_BRACKET_WORK, _PARSE_WORK, _MEMBER_WORK = 8, 2, 512
"""Work per bracket, per parsed byte and per member, in addition to their bytes."""
_FIRST_LOOK: Final = 512
_UTF8_CHUNK: Final = 128 * 1024

_SPACE: Final = re.compile(rb"[ \t\n\r]*")
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]+")
_QUOTE: Final = b'"'


class InvalidJson(ValueError):
    """The document is not JSON in UTF-8."""


class NotAnObject(ValueError):
    """The document is not a JSON object."""


class TooManyMembers(ValueError):
    """The object has more members than ``MOST_MEMBERS``."""


def scan(data: memoryview) -> Steps[Members]:
    """Find the members of a JSON object, yielding after every slice of work.

    Raises:
        InvalidJson: it is not JSON, as far as that is checked.
        NotAnObject: it is JSON of another type.
        TooDeep: it has more than ``MAX_DEPTH`` levels.
        TooManyMembers: it has too many members.
    """
    yield from _check_utf8(data)
    return (yield from _Scanner(data).members())


def first_items(raw: RawJson) -> Iterator[Any]:
    """Yield the first items of an array, as many as end within ``LONGEST_PARSED`` bytes.

    Raises:
        InvalidJson: one of them is not JSON.
        TooDeep: one of them has too many levels.
    """
    scanner = _Scanner(raw.data[:LONGEST_PARSED])
    at = run(scanner.skip_space(1))
    while (end := run(scanner.item_end(at))) is not None:
        yield _parse(scanner.data[at:end])
        at = run(scanner.skip_space(run(scanner.skip_space(end)) + 1))


def run(steps: Steps[T]) -> T:
    """Run a generator without pauses; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _check_utf8(data: memoryview) -> Steps[None]:
    decoder = getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _UTF8_CHUNK):
            decoder.decode(data[start : start + _UTF8_CHUNK])
            yield
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InvalidJson from None


class _Scanner:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._left = _SLICE

    def members(self) -> Steps[Members]:
        data, found = self.data, list[tuple[str, ByteSpan]]()
        at = yield from self.skip_space(0)
        if self._byte(at) != b"{":
            if len(data) <= LONGEST_PARSED:
                _parse(data)
            raise NotAnObject
        at = yield from self.skip_space(at + 1)
        more = self._byte(at) != b"}"
        at += not more
        while more:
            if len(found) == MOST_MEMBERS:
                raise TooManyMembers
            name, span = yield from self._member(at, len(found))
            found.append((name, span))
            at = yield from self.skip_space(span.end)
            more = self._byte(at) == b","
            if not more and self._byte(at) != b"}":
                raise InvalidJson
            at = yield from self.skip_space(at + 1)
        if (yield from self.skip_space(at)) != len(data):
            raise InvalidJson
        return Members(data, dict(found))

    def _member(self, start: int, number: int) -> Steps[tuple[str, ByteSpan]]:
        data = self.data
        if self._byte(start) != _QUOTE:
            raise InvalidJson
        end = yield from self._string_end(start)
        if end - start > LONGEST_PARSED:
            raise InvalidJson
        name = _parse(data[start:end])
        at = yield from self.skip_space(end)
        if self._byte(at) != b":":
            raise InvalidJson
        value = yield from self.skip_space(at + 1)
        end = yield from self._value_end(value, name)
        if (length := end - value) <= LONGEST_PARSED:
            yield from self._spend(_PARSE_WORK * length)
            _parse(data[value:end])
        yield from self._spend(_MEMBER_WORK)
        return name, ByteSpan(number, start, value, end)

    def _value_end(self, start: int, name: str | None) -> Steps[int]:
        first = self._byte(start)
        if first == _QUOTE:
            return (yield from self._string_end(start))
        if first in (b"[", b"{"):
            return (yield from self._container_end(start, name))
        found = _SCALAR.match(self.data, start, start + LONGEST_PARSED)
        if found is None:
            raise InvalidJson
        return found.end()

    def item_end(self, start: int) -> Steps[int | None]:
        """Return where an item of an array ends, or ``None`` if it does not end in these bytes."""
        try:
            end = yield from self._value_end(start, None)
        except InvalidJson:
            return None
        return end if end < len(self.data) else None

    def skip_space(self, start: int) -> Steps[int]:
        while True:
            found = _SPACE.match(self.data, start, start + _CHUNK)
            assert found is not None
            if found.end() < start + _CHUNK:
                return found.end()
            start = found.end()
            yield from self._spend(2 * _CHUNK)

    def _string_end(self, start: int) -> Steps[int]:
        at, size = start + 1, _FIRST_LOOK
        while chunk := bytes(self.data[at : at + size]):
            plain, used = blank_escapes(chunk)
            end = plain.find(_QUOTE)
            if end >= 0:
                return at + end + 1
            if not used:
                break
            at += used
            yield from self._spend(size)
            size = min(2 * size, _CHUNK)
        raise InvalidJson

    def _container_end(self, start: int, name: str | None) -> Steps[int]:
        """Return where an array or object ends.

        The step doubles until a chunk contains the end, and is then halved until it is found.
        """
        at, size, depth, inside, near = start + 1, _FIRST_LOOK, 2, False, False
        while chunk := bytes(self.data[at : at + size]):
            plain, used = blank_escapes(chunk)
            signs, ends_inside = brackets(plain, inside)
            lowest, highest, last = levels(signs, depth) if signs else (depth, depth, depth)
            yield from self._spend(size + _BRACKET_WORK * len(signs))
            if lowest <= 1:
                if size <= _FIRST_LOOK:
                    end, highest = first_return(plain, depth, inside)
                    _refuse_depth(highest, name)
                    return at + end
                near = True
            elif not used:
                break
            else:
                _refuse_depth(highest, name)
                at += used
                depth = last
                inside = ends_inside
            size = max(size // 2, _FIRST_LOOK) if near else min(2 * size, _CHUNK)
        raise InvalidJson

    def _byte(self, at: int) -> bytes:
        return bytes(self.data[at : at + 1])

    def _spend(self, work: int) -> Steps[None]:
        self._left -= work
        if self._left <= 0:
            self._left = _SLICE
            yield


def _refuse_depth(highest: int, name: str | None) -> None:
    if highest > MAX_DEPTH:
        raise TooDeep(name)


def _parse(value: memoryview) -> Any:
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        raise InvalidJson from None
