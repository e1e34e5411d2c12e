"""How far the store is behind the journal: in bytes, and by the age of the oldest entry. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from app.ledger.journal import Position

_MOST_MARKS: Final = 600


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a journal holds that the store does not have yet.

    Attributes:
        moved: everything before it is in the store.
        written: the end of the journal.
        size: the bytes between them.
    """

    moved: Position
    written: Position
    size: int


def backlog_between(moved: Position, written: Position, ends: Mapping[int, int]) -> Backlog:
    """Return the backlog between two positions; ``ends`` has the lengths of complete segments."""
    if moved.segment >= written.segment:
        size = max(0, written.size - moved.size) if moved.segment == written.segment else 0
        return Backlog(moved, written, size)
    between = sum(ends.get(number, 0) for number in range(moved.segment + 1, written.segment))
    first = max(0, ends.get(moved.segment, 0) - moved.size)
    return Backlog(moved, written, first + between + written.size)


class Lag:
    """The age of the oldest entry that has not been moved, to the interval of the calls.

    Each call marks how far the journal was written by then. What is marked and not moved is at
    least that old. Marks get sparser in a long outage, the oldest is always kept.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, Position]] = deque()

    def seconds(self, backlog: Backlog, now: float) -> float:
        """Return the age at the monotonic time ``now``, in seconds."""
        marks = self._marks
        if marks and backlog.written < marks[-1][1]:
            # Another journal: the ledger's settings were changed.
            marks.clear()
        while marks and marks[0][1] <= backlog.moved:
            marks.popleft()
        if backlog.size and (not marks or marks[-1][1] < backlog.written):
            marks.append((now, backlog.written))
        if len(marks) > _MOST_MARKS:
            self._marks = marks = deque([marks[0], *list(marks)[2::2]])
        return now - marks[0][0] if marks and backlog.size else 0.0
