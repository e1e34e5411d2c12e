"""The flusher: a thread that moves records from journals to the store.

It reads the journal that the journal's thread writes. Its position is only in memory: after a crash
all records in the journal are written to the store again, which changes nothing there. A segment is
removed once the store has all its records, except those that it permanently rejects
(``app.ledger.dead_letter``). A segment with an unreadable frame is also set aside. The journals of
dead ingresses are handled by ``app.ledger.adoption``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Final

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_when_event_set
from tenacity.wait import wait_random_exponential

from app import alarms
from app.config.journal import JournalSettings
from app.ledger.adoption import BATCH, Adopter
from app.ledger.codec import Kind, read_segment
from app.ledger.dead_letter import Records, add_or_set_aside
from app.ledger.journal import Journal, Position
from app.ledger.segments import keep_segment, segment_path
from app.store.database import StoreAway
from app.supervision import PROCESS, keep_thread

LONGEST_RETRY_S: Final = 10.0
"""The longest time until the flusher notices that the store is back."""
_THREAD: Final = "ledger-flusher"

_log = logging.getLogger(__name__)


class OwnJournal:
    """Moves the journal of this process to the store, and tracks the position."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._first = 1
        self._segment, self._offset = 1, 0

    def flush(self, store: Records) -> int:
        """Move all written records, remove segments no longer needed; return the record count.

        Raises:
            StoreAway: the store is away; the rest has to wait.
        """
        moved = 0
        while True:
            written = self._journal.written
            behind = self._segment < written.segment
            # A segment without an end was created and never used.
            end = self._journal.ends.get(self._segment, 0) if behind else written.size
            moved += self._flush_segment(store, end)
            if not behind:
                return moved
            self._segment, self._offset = self._segment + 1, 0
            self._remove_what_is_not_needed()

    @property
    def position(self) -> Position:
        """Everything before it has been moved. May be read from any thread."""
        return Position(self._segment, self._offset)

    def rewind(self) -> None:
        """Start again at the oldest kept segment: the store that had the records is gone."""
        self._segment, self._offset = self._first, 0

    def _remove_what_is_not_needed(self) -> None:
        for number in range(self._first, min(self._segment, self._journal.needed_from)):
            segment_path(self._journal.path, number).unlink()
            self._journal.ends.pop(number, None)
            self._first = number + 1

    def _flush_segment(self, store: Records, end: int) -> int:
        path = segment_path(self._journal.path, self._segment)
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(max(0, end - self._offset))
        start, moved = self._offset, 0
        segment = read_segment(data)
        if not segment.whole:
            # Before its records are moved, because then the file may be removed.
            self._keep_damaged()
        settled = (f for f in segment.frames if f.kind is Kind.SETTLED)
        while batch := list(islice(settled, BATCH)):
            add_or_set_aside(store, [found.body for found in batch], self._journal.path.parent)
            self._offset = start + batch[-1].end
            moved += len(batch)
        self._offset = start + len(data)
        return moved

    def _keep_damaged(self) -> None:
        kept = keep_segment(self._journal.path, self._segment)
        alarms.PROCESS.raised(
            "journal damaged",
            f"entries of this ingress's own journal cannot be read and are not on the bill; file "
            f"{self._segment} is kept in {kept}",
        )


class Flusher:
    """The thread that flushes and adopts.

    ``freed`` is called on this thread after every round, because space may have become free.
    """

    def __init__(
        self,
        journal: Journal,
        folder: Path,
        settings: JournalSettings,
        store: Records,
        freed: Callable[[], None],
    ) -> None:
        self.away_since: float | None = None
        """Since when records cannot be moved, by the monotonic clock; ``None`` if they can."""
        self._own = OwnJournal(journal)
        self._turned = journal.turned
        self.adopter = Adopter(folder, store)
        self._settings = settings
        self._store = store
        self._freed = freed
        self._stop = threading.Event()
        self._next_adoption = 0.0
        self._retrying = Retrying(
            retry=retry_if_exception_type((StoreAway, OSError)),
            wait=wait_random_exponential(multiplier=0.2, max=LONGEST_RETRY_S),
            stop=stop_when_event_set(self._stop),
            sleep=self._pause,
            before_sleep=self._note_outcome,
            retry_error_callback=lambda state: None,
        )
        self._thread = keep_thread(_THREAD, self._run, stop=self._stop)

    @property
    def away(self) -> bool:
        """Whether the last attempt to move records to the store failed."""
        return self.away_since is not None

    @property
    def position(self) -> Position:
        """Everything in the own journal before it has been moved."""
        return self._own.position

    def stop(self) -> None:
        """End the thread after its current step."""
        self._stop.set()
        self._turned.set()
        self._thread.join()

    def finish(self) -> bool:
        """Move the rest of a closed journal; return whether the store has all of it now."""
        try:
            self._own.flush(self._store)
        except (StoreAway, OSError) as error:
            _log.warning("the journal is left to the next ingress on this node: %s", error)
            return False
        except Exception as error:
            PROCESS.failed(_THREAD, error, restarts=False)
            return False
        return True

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turned.clear()
                self._retrying(self._round)
                # Also woken by a new segment: streams with much progress fill segments faster than
                # there are records to move.
                self._turned.wait(self._settings.flush_interval_s)
        except Exception as error:
            self._note_failure(error)
            raise

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _round(self) -> None:
        if self._store.prepare():
            self._own.rewind()
        moved = self._own.flush(self._store)
        if time.monotonic() >= self._next_adoption:
            moved += self.adopter.adopt(time.monotonic())
            self._next_adoption = time.monotonic() + self._settings.adopt_interval_s
        if self.away:
            _log.warning("the ledger's store can be reached again; %d records moved", moved)
        self.away_since = None
        self._freed()

    def _note_outcome(self, state: RetryCallState) -> None:
        self._note_failure(state.outcome.exception() if state.outcome is not None else None)

    def _note_failure(self, error: BaseException | None) -> None:
        if self.away_since is None:
            self.away_since = time.monotonic()
            _log.error("records stay in the journal, the store cannot take them: %s", error)
