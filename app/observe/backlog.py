"""Work that observers leave for later: a bounded list, and a supervised thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from app import alarms, supervision

EVERY_S: Final = 0.25
"""How often what waits is taken off."""

_T = TypeVar("_T")


class Backlog(Generic[_T]):
    """Takes items from the event loop, and passes them to ``write`` in batches on a thread.

    Items that do not fit are dropped and alarmed, and so is a batch that ``write`` fails on.

    Args:
        name: of the thread and of the alarms.
        write: may block.
        most: how many items may wait.
        batch: how many items ``write`` gets at most.
    """

    def __init__(
        self, name: str, write: Callable[[list[_T]], None], *, most: int, batch: int
    ) -> None:
        self._name = name
        self._write = write
        self._most = most
        self._batch = batch
        self._waiting: deque[_T] = deque()
        self._stop = threading.Event()
        self._thread = supervision.keep_thread(name, self._run, stop=self._stop)

    def put(self, item: _T) -> None:
        """Have an item written soon, or drop it if too many wait. The call does not block."""
        if len(self._waiting) >= self._most:
            alarms.PROCESS.raised(f"{self._name} full", "entries are dropped")
            return
        self._waiting.append(item)

    def close(self, patience_s: float | None = None) -> bool:
        """Write what waits and end the thread; return whether it has ended in time. Blocks.

        What is left when the thread ends, because ``write`` fails, is lost and alarmed.
        """
        self._stop.set()
        self._thread.join(patience_s)
        if self._thread.is_alive():
            return False
        if self._waiting:
            self._lost(len(self._waiting))
            self._waiting.clear()
        return True

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._stop.wait(EVERY_S)
            while count := min(self._batch, len(self._waiting)):
                # Only this thread takes items out.
                self._write_all([self._waiting.popleft() for _ in range(count)])

    def _write_all(self, items: list[_T]) -> None:
        try:
            self._write(items)
        except Exception:
            self._lost(len(items))
            raise

    def _lost(self, count: int) -> None:
        alarms.PROCESS.raised(f"{self._name} lost", f"{count} entries are lost")
