"""A JSON value that is kept as received bytes, because parsing it would take too long. Pure.

The bytes are part of a request's body, which may be an ``mmap``. They can be searched like
``bytes``, and are copied at most one chunk at a time.
"""

from __future__ import annotations

from typing import Final

_FIRST_CHUNK: Final = 512
_CHUNK: Final = 256 * 1024
_NARROW_CHUNK: Final = 16 * 1024


class RawJson:
    """A JSON value as received.

    Attributes:
        data: its bytes; the first byte determines its type.
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

    def find(
        self, needle: bytes, start: int, end: int | None = None, *, beside: bytes = b""
    ) -> int:
        """As ``bytes.find``, for a needle that is next to the byte ``beside``.

        Searching for one byte takes a fiftieth of the time of searching for several, so chunks
        without that byte are skipped. A needle that is not next to it may be found or not.
        """
        data = self.data
        end = len(data) if end is None else min(end, len(data))
        size, longest = _FIRST_CHUNK, _NARROW_CHUNK if beside else _CHUNK
        while start < end:
            first, length = max(start - 1, 0), min(size + len(needle) - 1, end - start)
            chunk = bytes(data[first : start + length + 1])
            if beside in chunk:
                found = chunk.find(needle, start - first, start - first + length)
                if found >= 0:
                    return first + found
            start += size
            size = min(2 * size, longest)
        return -1
