"""Measures how long the replicas of a pool take from the decision until they serve. Pure.

An engine reports only how long it took once its process existed. Before that, its replica may have
waited minutes for a node that the cluster's autoscaler had to add. The forecast must cover that
time too, and only the scaler knows when it decided.
"""

from __future__ import annotations

from collections import deque

# This many starts are remembered. The result is their third quartile: one node that took an hour
# should not set the forecast, but a cluster that has to grow should.
_REMEMBERED = 16
_PART = 0.75


class Starts:
    """The replicas of one pool that are starting, and how long the last ones took."""

    def __init__(self) -> None:
        self._ready: int | None = None
        # When each missing replica was ordered, the earliest first; None if that was not observed.
        self._missing: deque[float | None] = deque()
        self._took: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, now: float, target: int, ready: int) -> None:
        """Record how many replicas are wanted, and how many are ready.

        A failed replica counts as ordered again when it is first missing, because Serve restarts
        it then. If fewer are wanted, the last ones ordered are dropped.
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
        """How long a replica takes, by the last starts, in seconds; 0 while unknown."""
        took = sorted(self._took)
        return took[int(_PART * len(took))] if took else 0.0
