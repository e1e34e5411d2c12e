"""When waiting requests are to be raised to a better tier. Pure: the time is passed in."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

from sortedcontainers import SortedList

from app.flow.request import QueuedRequest

# When it is due, its number, and the request. A part of it is compared, too.
_Entry = tuple[Any, ...]


class Deadlines:
    """The waiting requests that are raised if they do not start in time.

    Those of one tier and route with the same wishes form a line: as long as the first of a line
    cannot be raised, none of it can. Every operation takes O(log n) time in each line.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, SortedList[_Entry]] = {}
        self._tried_at = -math.inf

    def add(self, request: QueuedRequest) -> None:
        """Add a request that begins to wait, if it may be raised."""
        if _may_be_raised(request):
            self._lines.setdefault(_wishes(request), SortedList()).add(_entry(request))

    def remove(self, request: QueuedRequest) -> None:
        """Remove a request that no longer waits, or is about to be raised."""
        if _may_be_raised(request):
            wishes = _wishes(request)
            line = self._lines[wishes]
            line.remove(_entry(request))
            if not line:
                del self._lines[wishes]

    def due(self, now: float) -> Iterator[QueuedRequest]:
        """Yield the requests that are due.

        The caller removes each one before the next is generated, or the rest of its line is left
        out.
        """
        self._tried_at = now
        for line in list(self._lines.values()):
            last = None
            while line and line[0][0] <= now and line[0][2] is not last:
                last = line[0][2]
                yield last

    def next_at(self) -> float:
        """Return when the next request is due that was not due when ``due`` was last called."""
        if not self._lines:
            return math.inf
        return min(self._next_of(line) for line in self._lines.values())

    def _next_of(self, line: SortedList[_Entry]) -> float:
        index = line.bisect_right((self._tried_at, math.inf))
        due_at: float = line[index][0] if index < len(line) else math.inf
        return due_at


def _may_be_raised(request: QueuedRequest) -> bool:
    if request.start_within_s == math.inf:
        return False
    first = request.raised_from is None and not request.replayed
    return first and request.raise_to.rank < request.tier.rank


def _wishes(request: QueuedRequest) -> Hashable:
    return request.tier, request.raise_to, request.route, request.raise_only


def _entry(request: QueuedRequest) -> _Entry:
    return request.since + request.start_within_s, request.number, request
