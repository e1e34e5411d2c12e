"""The top-level members of a JSON object, each parsed only when it is accessed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import orjson

from app.protocol.json_body.raw import RawJson

LONGEST_PARSED: Final = 32 * 1024
"""Documents and members of up to this many bytes may be parsed at once; longer ones stay bytes.
Parsing takes 1 ms at worst (nothing but empty arrays) and usually 0.05 ms."""


LONGEST_KEPT_PARSED: Final = 4 * 1024
"""Documents of up to this many bytes stay parsed while their requests wait. Parsed, they take up to
24 times as much memory."""


class ByteSpan(NamedTuple):
    """The position of a member: its number in the document, and the offsets of name and value."""

    number: int
    start: int
    value: int
    end: int


class Members(Mapping[str, Any]):
    """The members of a JSON object that is kept as bytes.

    A value is parsed at each access; one of more than ``LONGEST_PARSED`` bytes is returned as
    ``RawJson``. Of several members with the same name the last counts, as in every parser.
    """

    __slots__ = ("_data", "_spans")

    def __init__(self, data: memoryview, spans: Mapping[str, ByteSpan]) -> None:
        self._data = data
        self._spans = spans

    def __getitem__(self, name: str) -> Any:
        span = self._spans[name]
        value = self._data[span.value : span.end]
        return orjson.loads(value) if len(value) <= LONGEST_PARSED else RawJson(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def pieces(self, names: Iterable[str]) -> list[memoryview]:
        """Return the bytes of the members with these names, without nulls.

        Adjacent members are one piece, with the commas and spaces between them.
        """
        data, runs, last = self._data, list[list[int]](), -2
        for span in sorted(self._spans[name] for name in names):
            if span.end - span.value == 4 and bytes(data[span.value : span.end]) == b"null":
                continue
            if span.number == last + 1:
                runs[-1][1] = span.end
            else:
                runs.append([span.start, span.end])
            last = span.number
        return [data[start:end] for start, end in runs]


class Reparsed(Mapping[str, Any]):
    """The members of a document that was parsed whole, and is parsed again after ``forget``."""

    __slots__ = ("_body", "_fields")

    def __init__(self, body: bytes, fields: dict[str, Any]) -> None:
        self._body = body
        self._fields: dict[str, Any] | None = fields

    @property
    def fields(self) -> dict[str, Any]:
        """The members themselves."""
        if self._fields is None:
            self._fields = orjson.loads(self._body)
        return self._fields

    def forget(self) -> None:
        """Keep only the bytes until a member is accessed."""
        self._fields = None

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)
