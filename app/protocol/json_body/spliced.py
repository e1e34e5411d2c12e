"""A request body composed of parts of another one, without copying them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

JSON_TYPE: Final = b"application/json"
_PIECE: Final = 256 * 1024
"""Bytes passed to the socket at a time: 0.1 ms of copying into the kernel."""


class Spliced:
    """A body in pieces. Its length is in bytes; each iteration yields all pieces.

    Attributes:
        content_type: what it is.
    """

    __slots__ = ("_length", "_parts", "content_type")

    def __init__(
        self, parts: Sequence[bytes | memoryview], content_type: bytes = JSON_TYPE
    ) -> None:
        self.content_type = content_type
        self._parts = parts
        self._length = sum(map(len, parts))

    @classmethod
    def of(cls, first: bytes, rest: Sequence[memoryview]) -> Spliced:
        """Return an object with the members of the object ``first`` and the members in ``rest``."""
        parts: list[bytes | memoryview] = [first[:-1]]
        separator = b"" if first == b"{}" else b","
        for members in rest:
            parts += (separator, members)
            separator = b","
        return cls([*parts, b"}"])

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for part in self._parts:
            for start in range(0, len(part), _PIECE):
                yield part[start : start + _PIECE]
