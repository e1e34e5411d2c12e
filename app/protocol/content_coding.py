"""Decodes request bodies that were compressed, slice by slice. Pure.

A few kilobytes may decode to gigabytes. So a decoder returns at most ``SLICE`` bytes at a time, and
its caller decides after each slice whether there is room for more.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SLICE: Final = 256 * 1024
"""Most bytes that one step of decoding returns: 0.3 ms."""
_WINDOW_LOG: Final = 23
"""The largest window of zstd that HTTP allows (RFC 9659), 8 MiB, which the decoder holds."""
_RAW_DEFLATE: Final = -15
_ZLIB: Final = 15
_GZIP: Final = 31


class UnknownCoding(ValueError):
    """A ``Content-Encoding`` that is not decoded here."""


class InvalidCoded(ValueError):
    """The body is not valid in its coding, or ends too early."""


class _Step(Protocol):
    """Decodes one member of a body: zlib's object, or zstd's behind the same methods."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Zstd:
    """zstd's decoder, which keeps what it has not consumed, with the interface of zlib's."""

    def __init__(self) -> None:
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
        self._decoder = zstd.ZstdDecompressor(options=options)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def unconsumed_tail(self) -> bytes:
        return b""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._decoder.decompress(data, max_length)


def _deflate(start: bytes) -> _Step:
    # RFC 9110 means zlib's format, and some clients send deflate alone.
    number = int.from_bytes(start[:2], "big")
    is_zlib = start[0] & 0x0F == 8 and number % 31 == 0
    return zlib.decompressobj(_ZLIB if is_zlib else _RAW_DEFLATE)


_MAKERS: Final[dict[str, Callable[[bytes], _Step]]] = {
    "gzip": lambda _: zlib.decompressobj(_GZIP),
    "deflate": _deflate,
    "zstd": lambda _: _Zstd(),
}
_ALIASES: Final = {"x-gzip": "gzip"}
_SEVERAL_MEMBERS: Final = frozenset({"gzip", "zstd"})
_MOST_MEMBERS: Final = 64
"""Most members of one body. Clients send one; each costs a decoder and a copy of the rest."""
CODINGS: Final = tuple(_MAKERS)
"""The codings that are decoded, by their names in HTTP."""


def decoder_for(content_encoding: bytes | None) -> Decoder | None:
    """Return the decoder for a ``Content-Encoding`` header; ``None`` if nothing is to be decoded.

    Raises:
        UnknownCoding: it names another coding, or several.
    """
    if not content_encoding:
        return None
    name = content_encoding.decode("latin-1").strip(" \t").lower()
    name = _ALIASES.get(name, name)
    if name in ("identity", ""):
        return None
    if name not in _MAKERS:
        raise UnknownCoding(name)
    return Decoder(name)


class Decoder:
    """Decodes one body, in whatever pieces it arrives.

    Attributes:
        coding: the name of its coding.
    """

    def __init__(self, coding: str) -> None:
        self.coding = coding
        self._start = b""
        self._step: _Step | None = None
        self._members = 1

    def slices(self, piece: bytes) -> Iterator[bytes]:
        """Yield what a piece decodes to, in slices, of which some may be empty.

        Raises:
            InvalidCoded: it is not valid.
        """
        try:
            yield from self._slices(piece)
        except (zlib.error, zstd.ZstdError) as error:
            raise InvalidCoded(self.coding) from error

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            InvalidCoded: it is not.
        """
        if self._start or self._step is None or not self._step.eof:
            raise InvalidCoded(self.coding)

    def _may_go_on(self) -> bool:
        """Count a further member; return whether it is allowed."""
        self._members += 1
        return self.coding in _SEVERAL_MEMBERS and self._members <= _MOST_MEMBERS

    def _slices(self, piece: bytes) -> Iterator[bytes]:
        rest, full = self._start + piece, False
        self._start = b""
        # After a full slice a decoder may have output left that needs no further input.
        while rest or full:
            if self._step is None or self._step.eof:
                if self._step is not None and not self._may_go_on():
                    raise InvalidCoded(self.coding)
                if len(rest) < 2:
                    self._start = rest
                    return
                self._step = _MAKERS[self.coding](rest)
            part = self._step.decompress(rest, SLICE)
            yield part
            full = len(part) == SLICE and not self._step.eof
            rest = self._step.unused_data if self._step.eof else self._step.unconsumed_tail
