"""The journal: the write-ahead log that makes records durable. One thread writes records in
batches; another allocates disk space in advance.

Entries that arrive during a write are written and synced together after it (group commit). So the
disk determines the latency of a record, but not the rate of records. A record is durable once it
has been synced. Entries without a waiter (progress of streams, and refused requests) are written
within ``LAZY_S`` and synced with the next record that has a waiter.

A new segment begins with all open records and their progress. Earlier segments are then needed only
for their settled records, and are removed as soon as the store has those. If the open records would
take more than half of a segment, new segments begin without them, and earlier ones stay.

Both threads are restarted after any failure (``app.supervision``). An entry is in the queue or in
the current batch until it is durable, so a restart loses none. A restart may write a batch a second
time; readers keep one record per request. While the writing thread fails, ``failing`` is set.
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
"""The longest time until an entry without a waiter is written, in seconds."""
_RETRY_S: Final = (0.05, 1.0)  # first and longest pause after a failed write
_REFUSED_S: Final = 0.1  # pause after a failed allocation of space
_THREAD: Final = "ledger-journal"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry to write: a frame, the id of its request, and the waiter to notify, if any."""

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
    """A position in a journal: a segment's number and an offset in bytes."""

    segment: int
    size: int


@dataclass(slots=True)
class _Batch:
    """Entries that were taken from the queue and are not known to be durable.

    Attributes:
        entries: the entries, in the order of their arrival.
        placed: whether they are written to the segment and only have to be synced.
    """

    entries: list[Entry] = field(default_factory=list)
    placed: bool = False


class Journal:
    """The journal of this process.

    Args:
        folder: the folder of all journals of this node.
        settings: the journal's settings.
        durable: called on the journal's thread with the waiters of durable entries.
        refused: called on the journal's thread after each failed write, with the waiters of open
            records: their requests need not be served. Their entries are still written later. If
            the journal ends without some entries, it is called with all waiters of those.

    Attributes:
        failing: whether entries cannot be written at present.
        ended: whether the journal is closed, so that no entry is written any more.

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
        # Held while a segment is created, so that segments are in the order of their numbers.
        self._making = threading.Lock()
        self._space_wanted = threading.Event()
        self.written = Position(1, 0)
        """The journal can be read up to this position."""
        self.needed_from = 1
        """The newest segment that begins with all open records. Earlier segments are needed only
        for their settled records."""
        self.ends: dict[int, int] = {}
        """The end offsets of earlier segments, by number. Their reader removes the entries."""
        self.turned = threading.Event()
        """Set when another segment is complete; it may not be needed any longer."""
        self._allocate()
        self._thread = keep_thread(_THREAD, self._run, stop=self._stop)
        self._allocator = keep_thread("ledger-space", self._keep_space, stop=self._stop)

    @property
    def room(self) -> int:
        """How many bytes can certainly be written: their space on the disk is allocated."""
        if self.failing or self._overdrawn:
            return 0
        return self._segment.left + sum(spare.left for spare in tuple(self._spares))

    def has_room(self, size: int) -> bool:
        """Return whether this many bytes can certainly be written. Called for every request."""
        if self.failing or self._overdrawn:
            return False
        return self._segment.left >= size or self.room >= size

    def reserve(self, reserved: int) -> None:
        """Set how many bytes the running requests may still need."""
        self._reserved = reserved

    def append(self, entry: Entry) -> None:
        """Queue an entry. Entries are written in the order of the calls."""
        self._entries.append(entry)

    def wake(self) -> None:
        """Have queued entries written now, and space allocated as needed."""
        self._wakes.put(None)

    def close(self) -> None:
        """Write the queued entries, unless that fails, and end. The journal stays locked."""
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
        """Try once more to write the remaining entries. If that fails, notify their waiters."""
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
        """Release the lock of a closed journal. Set ``remove`` if the store has all of it."""
        if remove:
            remove_journal(self.path)
        os.close(self._lock)

    @property
    def unfinished(self) -> bool:
        """Whether a record is open, or an entry is not known to be written."""
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
            # Read before the write: once it is set, no entry is appended any more.
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
        """Write the batch that a failure has left, if any, and then one of all queued entries."""
        if self._batch.entries and not self._write_until_done():
            return
        self._take()
        if self._batch.entries and not self._write_until_done():
            return
        self._note_success()
        if self._overdrawn or self.room < self._wanted_room:
            self._space_wanted.set()

    def _take(self) -> None:
        """Move queued entries to the batch; at any moment an entry is in at least one of them."""
        while self._entries:
            self._batch.entries.append(self._entries[0])
            self._entries.popleft()

    def _unwritten(self) -> list[Entry]:
        return [*self._batch.entries, *self._entries.copy()]

    def _write_until_done(self) -> bool:
        """Retry the batch until it is written, because its requests have been served.

        Returns:
            Whether it is written; ``False`` only while the journal is being closed.
        """
        pause, longest = _RETRY_S
        while not self._try_to_write(self._batch):
            # Also those that arrived meanwhile. Entries appended from now on see `failing`.
            self._refuse_open()
            if self._stop.wait(pause):
                return False
            pause = min(2 * pause, longest)
        return True

    def _refuse_open(self) -> None:
        self._refused([one.waiter for one in self._unwritten() if one.kind is Kind.OPEN])

    def _try_to_write(self, batch: _Batch) -> bool:
        """Write and sync the batch. Steps that are already done are not repeated."""
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
        """Switch to a new segment. It begins with the open records unless they are too many."""
        self._segment.sync()
        with self._making:
            if not self._spares:
                # Entries were longer than the reserved space. They are still written.
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
        """Allocate space on a separate thread, so that no record waits for a new segment."""
        while not self._stop.is_set():
            # Allocate before waiting, because after a restart the event may be cleared already.
            self._space_wanted.clear()
            self._allocate()
            self._space_wanted.wait()

    @property
    def _wanted_room(self) -> int:
        # One segment more than twice the bytes that running requests may write.
        return self._settings.segment_bytes + 2 * self._reserved

    def _allocate(self) -> None:
        """Allocate space ahead of need."""
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
        """Allocate one more segment, or return why that is not possible."""
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
        # The number follows the files on disk. A failure may have left an unused file, which
        # readers skip; they would not skip a missing number.
        number = max(segment_numbers(self.path), default=self._segment.number) + 1
        return SegmentFile(self.path, number, self._settings.segment_bytes)
