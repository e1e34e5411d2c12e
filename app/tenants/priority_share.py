"""The share of a key's requests that may be priority. Pure: the time is passed in."""

from __future__ import annotations

import math
from typing import Final

from app.tenants.window import MINUTE_S, Window

_FORGET_EVERY_S: Final = float(MINUTE_S)


class PriorityShares:
    """The priority shares of all recently used keys, at one ingress."""

    def __init__(self) -> None:
        self._shares: dict[str, PriorityShare] = {}
        self._forget_at = 0.0

    def enter(self, key_id: str, share: float, now: float, *, wants: bool) -> SharePart:
        """Add a request of a key; see ``PriorityShare.enter``."""
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._shares = {k: one for k, one in self._shares.items() if not one.is_idle(now)}
        return self._shares.setdefault(key_id, PriorityShare()).enter(share, now, wants=wants)

    def __len__(self) -> int:
        """Return how many keys it keeps."""
        return len(self._shares)


class PriorityShare:
    """Keeps the share of a key's requests that are served as priority below its limit.

    Each ingress enforces the share for its own requests of the last minute. So it holds for all
    ingresses together, to within one request each. Only decided requests count, with the tier that
    they are served as. Undecided priority requests count against the share and do not enlarge it,
    so requests that wait and leave gain nothing.

    While decided requests stay within the last minute, one ingress serves at most
    ``ceil(share * decided) + 1`` priority requests. A request that waits longer keeps the right
    that it got on arrival.
    """

    def __init__(self) -> None:
        self._all, self._priority = Window(), Window()
        self._undecided_priority = 0
        self._parts = 0

    def is_idle(self, now: float) -> bool:
        """Return whether it can be dropped: no request is open or counts any more."""
        return not (self._parts or self._all.used(now) or self._priority.used(now))

    def enter(self, share: float, now: float, *, wants: bool) -> SharePart:
        """Add a request; ``wants`` is whether it wants to be priority."""
        total = self._all.used(now) + 1
        priority = self._priority.used(now) + self._undecided_priority + 1
        allowed = wants and priority <= math.ceil(share * total)
        self._undecided_priority += allowed
        self._parts += 1
        return SharePart(self, allowed)

    def leave(self, part: SharePart) -> None:
        """Take an undecided request out. Only ``SharePart`` calls this and what follows."""
        self._undecided_priority -= part.allowed

    def count(self, now: float, *, priority: bool) -> None:
        """Count a request that is decided."""
        self._all.add(1, now)
        self._priority.add(int(priority), now)

    def end(self) -> None:
        """Note that a request has ended."""
        self._parts -= 1

    def lower(self) -> None:
        """Take a priority request back that is served at a lower tier after all."""
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
        """Count the tier that the request is served as.

        It is called again if the engine was lost and the request is lowered.
        """
        if self._served is None:
            self._book.leave(self)
            self._book.count(now, priority=priority)
        elif self._served and not priority:
            self._book.lower()
        self._served = priority

    def end(self) -> None:
        """End the request's part; undecided, it no longer counts. To be called for each request."""
        if self._ended:
            return
        if self._served is None:
            self._book.leave(self)
        self._book.end()
        self._ended = True
