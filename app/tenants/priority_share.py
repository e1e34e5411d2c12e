"""The part of a key's requests that may be priority. Pure: the time is passed in."""

from __future__ import annotations

import math

from app.tenants.rate_limit import Window


class PriorityShare:
    """Keeps the part of a key's requests that are served as priority below its share.

    Each ingress keeps it for its own requests of the last minute, and then it holds for all of
    them together, to within one request each. Only decided requests count, as what they are served
    as. Undecided priority requests are held against the share and do not enlarge it, so those that
    wait and leave win nothing. While decided requests stay within the last minute, one ingress
    serves at most ``ceil(share * decided) + 1`` priority requests. A request that waits longer
    keeps the right that it was given on arrival.
    """

    def __init__(self) -> None:
        self._all, self._priority = Window(), Window()
        self._undecided_priority = 0

    def enter(self, share: float, now: float, *, wants: bool) -> SharePart:
        """Take in a request, which may want to be priority."""
        total = self._all.used(now) + 1
        priority = self._priority.used(now) + self._undecided_priority + 1
        allowed = wants and priority <= math.ceil(share * total)
        self._undecided_priority += allowed
        return SharePart(self, allowed)

    def _leave(self, part: SharePart) -> None:
        self._undecided_priority -= part.allowed

    def _count(self, now: float, *, priority: bool) -> None:
        self._all.add(1, now)
        self._priority.add(int(priority), now)

    def _lower(self) -> None:
        self._priority.take_back(1)


class SharePart:
    """One request of a key with a priority share.

    Attributes:
        allowed: whether it may be priority.
    """

    def __init__(self, book: PriorityShare, allowed: bool) -> None:
        self.allowed = allowed
        self._book = book
        self._served: bool | None = None
        self._ended = False

    def decide(self, now: float, *, priority: bool) -> None:
        """Count what it is served as; once more where its engine was lost and it is lowered."""
        if self._served is None:
            self._book._leave(self)
            self._book._count(now, priority=priority)
        elif self._served and not priority:
            self._book._lower()
        self._served = priority

    def end(self) -> None:
        """Forget it, if it has not been decided; to be called for every request."""
        if self._served is None and not self._ended:
            self._book._leave(self)
        self._ended = True
