"""How often an engine has suspended a request, as the code inside the engine tells it.

``deployments/engines/inside/frontline_tally.py`` sends the counts. Engines without it send none.
"""

from __future__ import annotations

from typing import Final

from app.protocol.sse import EventReader

HEADER: Final = b"x-frontline-preemptions"
"""The header of an answer, with the count at its beginning."""
_COMMENT: Final = b": frontline-preemptions "
_MOST_DIGITS: Final = 6


def read_count(text: bytes) -> int | None:
    """Return a count; ``None`` if it is none."""
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) <= _MOST_DIGITS else None


class EngineEvents(EventReader):
    """Cuts an engine's stream into blocks, without the comments that are counts.

    Attributes:
        preemptions: the latest count; ``None`` if the engine tells none.
    """

    def __init__(self, preemptions: int | None) -> None:
        super().__init__()
        self.preemptions = preemptions

    def blocks(self, piece: bytes) -> list[bytes]:
        """See ``EventReader``."""
        # Not `super()`: this runs for every piece.
        whole = not self._rest
        blocks = EventReader.blocks(self, piece)
        # A comment that begins in one piece and ends in another is in neither.
        if whole and _COMMENT not in piece:
            return blocks
        return [block for block in blocks if not self._took(block)]

    def _took(self, block: bytes) -> bool:
        """Take the count of a block; return whether the block is one."""
        count = read_count(block.removeprefix(_COMMENT)) if block.startswith(_COMMENT) else None
        if count is not None:
            self.preemptions = count
        return count is not None
