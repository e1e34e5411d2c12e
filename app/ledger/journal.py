"""The journal: where a record is durable first. One thread writes, and many records at once;
another takes the space for it beforehand.

Whatever arrives while a write is under way is written and synced together after it (group
commit), so the disk sets the latency of a record and never the rate of records. A record is
durable once it has been synced. What nobody waits for, the progress of streams and requests that
were turned away, is written within ``LAZY_S`` and synced with the next record that somebody
waits for.

A new segment begins with all records that are still open and their progress. Segments before it
are then needed for their settled records alone, and go as soon as the store has those. While so
much is open that it would take more than half of a segment, segments follow without it, and stay.

Both threads are restarted whatever they fail with (``app.supervision``). An entry is in the queue
or in the batch at hand until it is durable, so a restart loses none. It may write a batch a second
time; readers keep one record of a request. While the writing thread fails, ``failing`` is set.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from app.config.journal import JournalSettings
from app.ledger.codec import Kind, frame
from app.ledger.segments import (
    SegmentFile,
    bytes_taken,
    create_journal,
    remove_journal,
    segment_numbers,
)
from app.supervision import PROCESS, keep_thread

_MOST_UNSYNCED: Final = 1024 * 1024
LAZY_S: Final = 0.05
"""How soon what nobody waits for is written."""
_RETRY_S: Final = (0.05, 1.0)  # first and longest pause after a failed write
_REFUSED_S: Final = 0.1  # how long no space is asked for after there was none
_THREAD: Final = "ledger-journal"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """Something to write down: a frame, the request that it is about, and who waits for it."""

    kind: Kind
    request_id: str
    line: bytes
    waiter: Any = None

    @classmethod
    def of(cls, kind: Kind, request_id: str, body: bytes, waiter: Any = None) -> Entry:
        """Return the entry of a frame's body."""
        return cls(kind, request_id, frame(kind, body), waiter)


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a journal: so many bytes of a segment."""

    segment: int
    size: int


@dataclass(slots=True)
class _Batch:
    """Entries that were taken from the queue and are not known to be durable.

    Attributes:
        entries: in the order in which they came.
        placed: whether they are in the segment, and have only to be synced.
    """

    entries: list[Entry] = field(default_factory=list)
    placed: bool = False


class Journal:
    """The journal of this process. ``durable`` is called, on its thread, with who has waited.

    ``refused`` is called there, too, each time a write has failed: with those who wait for open
    records, which need not be served. Their entries are written all the same, later. When the
    journal ends without some entries, it is called with everybody who waits for one of them.

    Attributes:
        failing: whether entries cannot be written at present.
        ended: whether it is closed, so that no entry is written any more.

    Raises:
        OSError: the folder cannot be written, or there is no space for the first segment.
    """

    def __init__(
        self,
        folder: Path,
        settings: JournalSettings,
        durable: Callable[[list[Any]], None],
        refused: Callable[[list[Any]], None],
    ) -> None:
        self.path, self._lock = create_journal(folder)
        self.failing = self.ended = False
        self._batch = _Batch()
        self._stop = threading.Event()
        self._folder = folder
        self._settings = settings
        self._durable = durable
        self._refused = refused
        self._entries: deque[Entry] = deque()
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._open: dict[str, bytes] = {}
        self._progress: dict[str, bytes] = {}
        self._reserved = 0
        self._segment = SegmentFile(self.path, 1, settings.segment_bytes)
        self._spares: deque[SegmentFile] = deque()
        self._overdrawn = False
        self._refused_until = 0.0
        self._trouble: str | None = None
        # Held while a segment is made, so that they come in the order of their numbers.
        self._making = threading.Lock()
        self._space_wanted = threading.Event()
        self.written = Position(1, 0)
        """Up to here it can be read."""
        self.needed_from = 1
        """The segment that began with all that was open: those before it hold nothing else."""
        self.ends: dict[int, int] = {}
        """Where the segments before the present one end, by number; their reader forgets them."""
        self.turned = threading.Event()
        """Set when there is a segment more behind, which may not be needed any longer."""
        self._allocate()
        self._thread = keep_thread(_THREAD, self._run, stop=self._stop)
        self._allocator = keep_thread("ledger-space", self._keep_space, stop=self._stop)

    @property
    def room(self) -> int:
        """How many bytes can be written for sure: their space on the disk is taken."""
        if self.failing or self._overdrawn:
            return 0
        return self._segment.left + sum(spare.left for spare in tuple(self._spares))

    def has_room(self, size: int) -> bool:
        """Whether so many bytes can be written for sure. Asked for every request."""
        if self.failing or self._overdrawn:
            return False
        return self._segment.left >= size or self.room >= size

    def reserve(self, reserved: int) -> None:
        """Say how many bytes the requests under way may still need."""
        self._reserved = reserved

    def append(self, entry: Entry) -> None:
        """Take an entry; entries are written in the order of the calls."""
        self._entries.append(entry)

    def wake(self) -> None:
        """Have what was taken written now, and space taken as far as it is needed."""
        self._wakes.put(None)

    def close(self) -> None:
        """Write what was taken, unless that fails, and no more. It stays locked."""
        self._stop.set()
        self._wakes.put(None)
        self._thread.join()
        self._space_wanted.set()
        self._allocator.join()
        self._write_the_rest()
        self._segment.close()
        while self._spares:
            self._spares.pop().discard()

    def _write_the_rest(self) -> None:
        """Try once more to write what the thread has left; who waits for it is told if it fails."""
        try:
            self._write_batches()
        except Exception as error:
            PROCESS.failed(_THREAD, error, restarts=False)
        self.failing = self.ended = True
        left = self._unwritten()
        if left:
            _log.error("the journal ends without %d entries", len(left))
            self._refused([entry.waiter for entry in left if entry.waiter is not None])

    def release(self, *, remove: bool) -> None:
        """Give up the lock of a closed journal; ``remove`` it if the store has all of it."""
        if remove:
            remove_journal(self.path)
        os.close(self._lock)

    @property
    def unfinished(self) -> bool:
        """Whether a record is open, or an entry has not been written for sure."""
        return bool(self._open or self._unwritten())

    def _run(self) -> None:
        try:
            self._keep_writing()
        except Exception:
            self.failing = True
            self._refuse_open()
            raise

    def _keep_writing(self) -> None:
        while True:
            # Read first: nothing is appended any more once it is set.
            ending = self._stop.is_set()
            self._write_batches()
            if ending:
                return
            self._wait()

    def _wait(self) -> None:
        self._wakes.get()
        if self._settings.commit_window_ms:
            time.sleep(self._settings.commit_window_ms / 1000)
        with suppress(Empty):
            while True:
                self._wakes.get_nowait()

    def _write_batches(self) -> None:
        """Write the batch that a failure has left, if there is one, and one of all that came."""
        if self._batch.entries and not self._write_until_done():
            return
        self._take()
        if self._batch.entries and not self._write_until_done():
            return
        self._note_success()
        if self._overdrawn or self.room < self._wanted_room:
            self._space_wanted.set()

    def _take(self) -> None:
        """Move what came to the batch at hand; at no moment is an entry in neither."""
        while self._entries:
            self._batch.entries.append(self._entries[0])
            self._entries.popleft()

    def _unwritten(self) -> list[Entry]:
        return [*self._batch.entries, *self._entries.copy()]

    def _write_until_done(self) -> bool:
        """Write the batch, however long the disk refuses it: these requests have been served.

        Returns:
            Whether it is written; ``False`` only where the journal is being closed.
        """
        pause, longest = _RETRY_S
        while not self._try_to_write(self._batch):
            # Those that came meanwhile, too: what is appended from now on finds it failing.
            self._refuse_open()
            if self._stop.wait(pause):
                return False
            pause = min(2 * pause, longest)
        return True

    def _refuse_open(self) -> None:
        self._refused([one.waiter for one in self._unwritten() if one.kind is Kind.OPEN])

    def _try_to_write(self, batch: _Batch) -> bool:
        """Take the batch through all of its steps; those that were done before change nothing."""
        waiters = [entry.waiter for entry in batch.entries if entry.waiter is not None]
        try:
            if not batch.placed:
                self._place(batch.entries)
                batch.placed = True
            if waiters or self._segment.unsynced > _MOST_UNSYNCED:
                self._segment.sync()
        except OSError as error:
            if not self.failing:
                _log.error("the journal cannot be written, requests get 503: %s", error)
            self.failing = True
            return False
        self._note(batch.entries)
        self._note_success()
        self._durable(waiters)
        self._batch = _Batch()
        return True

    def _note_success(self) -> None:
        if self.failing:
            _log.warning("the journal can be written again")
        self.failing = False

    def _place(self, batch: list[Entry]) -> None:
        data = b"".join([entry.line for entry in batch])
        if len(data) > self._segment.left:
            self._turn()
        self._segment.write(data)

    def _note(self, batch: list[Entry]) -> None:
        for entry in batch:
            self._remember(entry)
        if self._segment.number != self.written.segment:
            self.turned.set()
        self.written = Position(self._segment.number, self._segment.size)

    def _turn(self) -> None:
        """Go on in a new segment, which begins with what is open unless that would fill it."""
        self._segment.sync()
        with self._making:
            if not self._spares:
                # Entries were longer than what was kept for them. They are written all the same.
                self._spares.append(self._create())
                self._overdrawn = True
        following = self._spares[0]
        carried = b"".join([*self._open.values(), *self._progress.values()])
        worthwhile = len(carried) <= following.left // 2
        if worthwhile:
            following.write(carried)
        self._spares.popleft()
        before, self._segment = self._segment, following
        self.ends[before.number] = before.size
        before.close()
        following.sync()
        if worthwhile:
            self.needed_from = following.number

    def _remember(self, entry: Entry) -> None:
        request_id = entry.request_id
        if entry.kind is Kind.OPEN:
            self._open[request_id] = entry.line
        elif entry.kind is Kind.SETTLED:
            self._open.pop(request_id, None)
            self._progress.pop(request_id, None)
        elif request_id in self._open:
            self._progress[request_id] = entry.line

    def _keep_space(self) -> None:
        """Take space on a thread of its own: no record waits for the making of a segment."""
        while not self._stop.is_set():
            # First, since a restart must not wait to be asked once more.
            self._space_wanted.clear()
            self._allocate()
            self._space_wanted.wait()

    @property
    def _wanted_room(self) -> int:
        # A segment more than what requests under way may write.
        return self._settings.segment_bytes + 2 * self._reserved

    def _allocate(self) -> None:
        """Take space ahead of need."""
        while (
            not self._stop.is_set()
            and self.room < self._wanted_room
            and time.monotonic() >= self._refused_until
        ):
            with self._making:
                trouble = self._take_segment()
            if trouble is None:
                self._overdrawn = False
            else:
                self._refused_until = time.monotonic() + _REFUSED_S
            if trouble is not None and self._trouble is None:
                _log.warning("no more space for the journal: %s", trouble)
            self._trouble = trouble

    def _take_segment(self) -> str | None:
        """Take space for one more segment, or return why there is none."""
        if self.failing:
            return "the disk is failing"
        if bytes_taken(self._folder) + self._settings.segment_bytes > self._settings.max_bytes:
            return "the journals of this node are as large as they may be (max_mb)"
        try:
            self._spares.append(self._create())
        except OSError as error:
            return str(error)
        return None

    def _create(self) -> SegmentFile:
        # By what is on the disk: a failure may have left a file that is never used, and readers
        # pass over it; they would not pass over a number that is missing.
        number = max(segment_numbers(self.path), default=self._segment.number) + 1
        return SegmentFile(self.path, number, self._settings.segment_bytes)
