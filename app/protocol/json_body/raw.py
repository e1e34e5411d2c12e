"""A JSON value that is kept as the bytes that came, because parsing it would take too long. Pure.

Its bytes are part of a request's body, which may be an ``mmap``. It can be searched like ``bytes``,
without copying more than a chunk at a time.
"""

from __future__ import annotations

from typing import Final

_FIRST_CHUNK: Final = 512
_CHUNK: Final = 256 * 1024


class RawJson:
    """A JSON value as it came.

    Attributes:
        data: its bytes; the first one gives its type.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)

    def __len__(self) -> int:
        """Return its length in bytes."""
        return len(self.data)

    def startswith(self, prefix: bytes, start: int = 0) -> bool:
        """As ``bytes.startswith``."""
        return bytes(self.data[start : start + len(prefix)]) == prefix

    def count(self, byte: bytes, end: int) -> int:
        """Return how often a single byte occurs before ``end``."""
        end = min(end, len(self.data))
        return sum(
            bytes(self.data[start : min(start + _CHUNK, end)]).count(byte)
            for start in range(0, end, _CHUNK)
        )

    def find(self, needle: bytes, start: int, end: int | None = None) -> int:
        """As ``bytes.find``."""
        end = len(self.data) if end is None else min(end, len(self.data))
        size, overlap = _FIRST_CHUNK, len(needle) - 1
        while start < end:
            found = bytes(self.data[start : min(start + size + overlap, end)]).find(needle)
            if found >= 0:
                return start + found
            start += size
            size = min(2 * size, _CHUNK)
        return -1
