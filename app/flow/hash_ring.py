"""Maps a prompt's prefix to a replica by consistent hashing. Pure.

Every ingress finds the same replica for the same prefix without any messages. A replica that comes
or goes moves only its own share of the prefixes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from zlib import crc32

# Points of each replica. Enough to spread prefixes; load limits affinity anyway.
_POINTS = 8


class HashRing:
    """Replicas on a ring of 32-bit hashes."""

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []

    def add(self, replica_id: str) -> None:
        """Add a replica to the ring."""
        for point in _points(replica_id):
            insort(self._points, point)

    def remove(self, replica_id: str) -> None:
        """Remove a replica, which must be on the ring."""
        for point in _points(replica_id):
            del self._points[bisect_left(self._points, point)]

    def after(self, prefix: int, steps: int) -> list[str]:
        """Return the replicas at the next ``steps`` points of the ring, possibly repeatedly."""
        points = self._points
        start = bisect_left(points, (prefix, ""))
        found = points[start : start + steps]
        if len(found) < steps:
            found += points[: min(steps - len(found), start)]
        return [replica_id for _, replica_id in found]


def _points(replica_id: str) -> list[tuple[int, str]]:
    return [(crc32(f"{point}:{replica_id}".encode()), replica_id) for point in range(_POINTS)]
