"""How long the replicas of a pool take from the decision that orders them until they serve. Pure.

An engine can tell how long it took once its process was there. Its replica may have waited for a
node before that, which a cluster's own autoscaler has to bring up first: minutes that whoever
decides has to look ahead, too. Only whoever decides knows when it did.
"""

from __future__ import annotations

from collections import deque

# So many starts are remembered, of which three quarters took no longer than what is told: a single
# node that did not come up for an hour is not what to look ahead by, a cluster that has to grow is.
_REMEMBERED = 16
_PART = 0.75


class Starts:
    """What has been ordered of one pool and is not ready yet, and how long the last ones took."""

    def __init__(self) -> None:
        self._ready: int | None = None
        # When each was ordered that is missing, the earliest first; None if nobody saw that.
        self._missing: deque[float | None] = deque()
        self._took: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, now: float, target: int, ready: int) -> None:
        """Take note of how many replicas there are to be, and how many are ready.

        One that has failed counts as ordered anew when it is missed, as Serve does that. One that
        is not wanted any more is the last that was ordered.
        """
        missing, first = self._missing, self._ready is None
        for _ in range(min(ready - (self._ready or 0), len(missing))):
            ordered = missing.popleft()
            if ordered is not None:
                self._took.append(now - ordered)
        self._ready = ready
        while len(missing) > max(0, target - ready):
            missing.pop()
        while len(missing) < target - ready:
            missing.append(None if first else now)

    @property
    def took_s(self) -> float:
        """How long a replica takes, as the last ones did; 0 while nobody knows."""
        took = sorted(self._took)
        return took[int(_PART * len(took))] if took else 0.0
