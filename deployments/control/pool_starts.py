"""What the engines of one model that are starting do, from the notes of their replicas. Pure.

Serve passes no call on to a replica that is starting, and it may be on any node. So it leaves a
note of its own in Ray's key-value store, again every second, and removes it when the start has
ended. A replica that was killed removes nothing, so the Model removes a note that has stopped
changing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from app import alarms
from app.contracts.start import PoolStart

STALE_S: Final = 10.0
"""A start whose note has not changed for so long has ended without a word, or its node is gone."""
IDLE_S: Final = 5.0
"""How often the notes are read while no start is known or awaited, in seconds. Serve does not say
when it starts a replica beside ready ones, to scale up or to update. Such starts take longer."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A note, what is in it, and since when it is as it is, on the monotonic clock."""

    note: bytes
    start: PoolStart | None
    since: float


class PoolStarts:
    """The latest notes of one model's replicas, by name."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._read_at: float | None = None

    def due(self, now: float, *, awaited: bool) -> bool:
        """Return whether the notes are to be read at the monotonic time ``now``.

        Args:
            now: the time.
            awaited: whether a pool without replicas should have one.
        """
        idle = not self._seen and not awaited
        return not idle or self._read_at is None or now - self._read_at >= IDLE_S

    def take(self, notes: Mapping[str, bytes], now: float) -> list[str]:
        """Record all notes as they are at the monotonic time ``now``.

        Returns:
            The names of those that are to be removed.
        """
        before, self._seen, self._read_at = self._seen, {}, now
        for name, note in notes.items():
            seen = before.get(name)
            if seen is None or seen.note != note:
                seen = _Seen(note, _read(name, note), now)
            self._seen[name] = seen
        return [name for name, seen in self._seen.items() if now - seen.since >= STALE_S]

    def current(self, now: float) -> dict[str, PoolStart]:
        """Return what engines that are starting do, by the name of the replica's note."""
        return {
            name: seen.start
            for name, seen in self._seen.items()
            if seen.start is not None and now - seen.since < STALE_S
        }


def _read(name: str, note: bytes) -> PoolStart | None:
    """Return the start in a note; ``None`` if it is of another version, as during an update."""
    try:
        return PoolStart.from_note(note)
    except ValueError as error:
        alarms.PROCESS.raised("start report", f"the note {name} cannot be read", error)
        return None
