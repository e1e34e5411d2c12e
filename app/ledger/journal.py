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
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from app.ledger.frames import Kind, frame
from app.ledger.segments import (
    SegmentFile,
    bytes_taken,
    create_journal,
    remove_journal,
)
from app.ledger.settings import JournalSettings

_MOST_UNSYNCED: Final = 1024 * 1024
LAZY_S: Final = 0.05
"""How soon what nobody waits for is written."""
_RETRY_S: Final = (0.05, 1.0)  # first and longest pause after a failed write
_REFUSED_S: Final = 0.1  # how long no space is asked for after there was none

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


class Journal:
    """The journal of this process. ``durable`` is called, on its thread, with who has waited.

    ``refused`` is called there, too, each time the disk has refused to write: with those who wait
    for open records, which need not be served. Their entries are written all the same, later.

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
        self.failing = False
        # Whether the batch at hand is in the segment, and has only to be synced.
        self._placed = False
        self._closing = False
        self._folder = folder
        self._settings = settings
        self._durable = durable
        self._refused = refused
        self._entries: deque[Entry] = deque()
        self._wakes: SimpleQueue[bool] = SimpleQueue()
        self._open: dict[str, bytes] = {}
        self._progress: dict[str, bytes] = {}
        self._reserved = 0
        self._segment = SegmentFile(self.path, 1, settings.segment_bytes)
        self._spares: deque[SegmentFile] = deque()
        self._overdrawn = False
        self._refused_until = 0.0
        self._trouble: str | None = None
        self._allocated = 1
        # Held while a segment is made, so that they come in the order of their numbers.
        self._making = threading.Lock()
        self._space_wanted = threading.Event()
        self.written = Position(1, 0)
        """Up to here it can be read."""
        self.needed_from = 1
        """The segment that began with all that was open: those before it hold nothing else."""
        self.turned = threading.Event()
        """Set when there is a segment more behind, which may not be needed any longer."""
        self._allocate()
        self._thread = threading.Thread(target=self._run, name="ledger-journal", daemon=True)
        self._allocator = threading.Thread(
            target=self._keep_space, name="ledger-space", daemon=True
        )
        self._thread.start()
        self._allocator.start()

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
        self._wakes.put(True)

    def close(self) -> None:
        """Write what was taken, unless the disk refuses it, and no more. It stays locked."""
        self._closing = True
        self._wakes.put(False)
        self._thread.join()
        self._space_wanted.set()
        self._allocator.join()
        self._segment.close()
        while self._spares:
            self._spares.pop().discard()

    def release(self, *, remove: bool) -> None:
        """Give up the lock of a closed journal; ``remove`` it if the store has all of it."""
        if remove:
            remove_journal(self.path)
        os.close(self._lock)

    @property
    def has_open(self) -> bool:
        """Whether some stream's record is open."""
        return bool(self._open)

    def _run(self) -> None:
        going = True
        while going:
            going = self._wait()
            batch = self._take()
            if batch and self._write_until_done(batch):
                self._durable([entry.waiter for entry in batch if entry.waiter is not None])
            if self._overdrawn or self.room < self._wanted_room:
                self._space_wanted.set()

    def _wait(self) -> bool:
        going = self._wakes.get()
        if self._settings.commit_window_ms:
            time.sleep(self._settings.commit_window_ms / 1000)
        try:
            while True:
                going = self._wakes.get_nowait() and going
        except Empty:
            return going

    def _take(self) -> list[Entry]:
        batch = []
        try:
            while True:
                batch.append(self._entries.popleft())
        except IndexError:
            return batch

    def _write_until_done(self, batch: list[Entry]) -> bool:
        """Write a batch, however long the disk refuses it: these requests have been served."""
        pause, longest = _RETRY_S
        while not self._try_to_write(batch):
            # Those that came meanwhile, too: what is appended from now on finds it failing.
            behind = (*batch, *tuple(self._entries))
            self._refused([entry.waiter for entry in behind if entry.kind is Kind.OPEN])
            if self._closing:
                _log.error("the journal ends without %d entries", len(batch))
                return False
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return True

    def _try_to_write(self, batch: list[Entry]) -> bool:
        try:
            if not self._placed:
                self._place(batch)
                self._placed = True
            awaited = any(entry.waiter is not None for entry in batch)
            if awaited or self._segment.unsynced > _MOST_UNSYNCED:
                self._segment.sync()
        except OSError as error:
            if not self.failing:
                _log.error("the journal cannot be written, requests get 503: %s", error)
            self.failing = True
            return False
        if self.failing:
            _log.warning("the journal can be written again")
        self.failing = self._placed = False
        self._note(batch)
        return True

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
        self._segment.close()
        self._segment = following
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
        while not self._closing:
            self._space_wanted.wait()
            self._space_wanted.clear()
            self._allocate()

    @property
    def _wanted_room(self) -> int:
        # A segment more than what requests under way may write.
        return self._settings.segment_bytes + 2 * self._reserved

    def _allocate(self) -> None:
        """Take space ahead of need."""
        while (
            not self._closing
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
        created = SegmentFile(self.path, self._allocated + 1, self._settings.segment_bytes)
        self._allocated += 1
        return created
