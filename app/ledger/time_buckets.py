"""Divides a period into buckets with borders in UTC, and into pages of them. Pure.

Times are Unix seconds. A bucket lies between two multiples of its width, except that the first one
begins where the period begins, and the last one ends where the period ends.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from app.ledger.usage import Grouping

LATEST: Final = 253_402_214_400
"""The last time that may be asked for: the beginning of the last day of the year 9999."""
_CURSOR: Final = "page_"
_CURSOR_BYTES: Final = 8


class Width(StrEnum):
    """How long a bucket is, in the words of OpenAI's API."""

    MINUTE = "1m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def seconds(self) -> int:
        """The length in seconds."""
        return _WIDTHS[self][0]

    @property
    def grouping(self) -> Grouping:
        """The grouping of usage that has one group for each bucket."""
        return _WIDTHS[self][1]


_WIDTHS: Final = {
    Width.MINUTE: (60, Grouping.MINUTE),
    Width.HOUR: (3600, Grouping.HOUR),
    Width.DAY: (86_400, Grouping.DAY),
}


@dataclass(frozen=True, slots=True)
class Page:
    """Some consecutive buckets of a period.

    Attributes:
        start: when its first bucket begins.
        end: when its last bucket ends; ``start`` if it has none.
        width: the width of the buckets.
        next: when the first bucket of the next page begins; ``None`` if there is none.
    """

    start: int
    end: int
    width: Width
    next: int | None

    def buckets(self) -> Iterator[tuple[int, int]]:
        """Yield when each bucket begins and ends."""
        start = self.start
        while start < self.end:
            end = min(self.border(start) + self.width.seconds, self.end)
            yield start, end
            start = end

    def border(self, at: int) -> int:
        """Return the multiple of the width at or before a time."""
        return at - at % self.width.seconds


def page_of(start: int, end: int, width: Width, most: int) -> Page:
    """Return the page of at most so many buckets at the beginning of a period."""
    first = start - start % width.seconds
    until = max(start, min(first + most * width.seconds, end))
    return Page(start, until, width, until if until < end else None)


def border_of(group: str) -> int:
    """Return when a group begins whose day, hour or minute is this, such as ``2026-11-29T22``."""
    return int(datetime.fromisoformat(group).replace(tzinfo=UTC).timestamp())


def cursor_of(at: int) -> str:
    """Return the cursor of the page that begins at a time."""
    return _CURSOR + base64.urlsafe_b64encode(at.to_bytes(_CURSOR_BYTES)).decode()


def start_of(cursor: str) -> int | None:
    """Return when the page with a cursor begins; ``None`` if ``cursor_of`` has not made it."""
    try:
        packed = base64.urlsafe_b64decode(cursor.removeprefix(_CURSOR))
    except (ValueError, binascii.Error):
        return None
    at = int.from_bytes(packed[:_CURSOR_BYTES])
    return at if at <= LATEST and cursor_of(at) == cursor else None
