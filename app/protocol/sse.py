"""Server-sent events: the only module that knows their framing."""

from __future__ import annotations

from typing import Final, NamedTuple

DONE: Final = b"[DONE]"
"""The data of the event that ends an OpenAI stream."""


class Event(NamedTuple):
    """One event: its ``data`` (lines joined by a newline) and its name, empty if it has none."""

    data: bytes
    name: bytes = b""

    def encode(self) -> bytes:
        """Return the event as it goes over the wire."""
        head = b"event: " + self.name + b"\n" if self.name else b""
        return head + b"data: " + self.data.replace(b"\n", b"\ndata: ") + b"\n\n"


class EventReader:
    """Cuts a byte stream, in whatever pieces it arrives, into blocks: events as they came."""

    def __init__(self) -> None:
        self._rest = b""

    def blocks(self, piece: bytes) -> list[bytes]:
        """Return the blocks that ``piece`` completes, without the empty lines between them."""
        # Most pieces of a paced stream are one event of one line.
        if (
            piece.find(b"\n") == len(piece) - 2
            and piece.endswith(b"\n")
            and not self._rest
            and b"\r" not in piece
        ):
            return [piece[:-2]]
        text, held = self._rest + piece, b""
        if b"\r" in text:
            # A CR that ends the piece may be the first half of a CR LF: it waits for the next.
            held = b"\r" if text.endswith(b"\r") else b""
            text = text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blocks = _split(text)
        self._rest = blocks.pop() + held
        return blocks


def _split(text: bytes) -> list[bytes]:
    """Return what stands between empty lines."""
    # To look for one byte takes half as long as for two, and most events are one line.
    lines = text.split(b"\n")
    if len(lines) % 2 and not any(lines[1::2]):
        return lines[::2]
    return text.split(b"\n\n")


def comments(block: bytes) -> bytes:
    """Return the comments of a block as they go over the wire; empty if it has none."""
    if not block.startswith(b":") and b"\n:" not in block:
        return b""
    lines = [line for line in block.split(b"\n") if line.startswith(b":")]
    return b"\n".join((*lines, b"", b""))


def parse_block(block: bytes) -> Event | None:
    """Return the event of a block, or ``None`` if it has no data.

    Unknown fields are dropped, and so are comments, which ``comments`` returns.
    """
    if block.startswith(b"data: ") and b"\n" not in block:
        return Event(block[6:])
    name, data = b"", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return Event(b"\n".join(data), name) if data else None
