"""The ledger: records the usage and cost of every request durably before its answer ends.

    reserve ─> open ─> progress … ─> settle      a stream
    reserve ─> settle                            a unary answer
    reserve ─> open ─> write_off                 a stream whose open record the disk refused
    count                                        a request that was shed or refused

``settle``, and awaiting the result of ``open``, returns once the record survives the death of any
process and a loss of power. None of these calls waits for the database (``app.ledger.flusher``) or
creates a task.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine

from app.config.journal import JournalSettings
from app.core.paths import expand_path
from app.core.pricing import TokenUsage
from app.ledger.backlog import Backlog, backlog_between
from app.ledger.codec import Kind, Progress
from app.ledger.dead_letter import Records
from app.ledger.flusher import Flusher
from app.ledger.journal import LAZY_S, Entry, Journal
from app.ledger.record import State, UsageRecord, now_utc
from app.ledger.record_store import RecordStore

RESERVED_BYTES: Final = 4096
"""Room that a request needs in the journal: two records, another open one if its engine was lost, a
copy of that in the next segment, and a few steps of progress. A record takes 600 bytes with names
of usual length."""
MOST_OWED: Final = 4096
"""Records of shed and refused requests that are kept in memory while the journal has no room: less
than 4 MiB, and minutes of a client that retries at the given interval."""
PAY_S: Final = 0.2  # how often to check for room for them
_WAKE_EVERY: Final = 256
# Space is allocated ahead for twice the number of running requests, to keep up with bursts.

_log = logging.getLogger(__name__)


class Unrecordable(Exception):
    """The cost of a request cannot be recorded, so the request must not be served."""


class JournalFull(Unrecordable):
    """The journal has no room for another record.

    The store has been away for long, or the disk is full or failing.
    """


class DiskRefuses(Unrecordable):
    """A record could not be written, although room was reserved for it."""


class Opening:
    """An open record that is being written. Await it before the first byte of an answer is sent.

    Raises, when awaited:
        DiskRefuses: the write of the record failed, or all writes fail now.
    """

    __slots__ = ("_kept",)

    def __init__(self, kept: asyncio.Future[bool]) -> None:
        self._kept = kept

    def __await__(self) -> Generator[Any, None, None]:
        if not (yield from self._kept.__await__()):
            raise DiskRefuses


class _Room:
    """A context that reserves room for one request. It may be entered many times at once."""

    __slots__ = ("_release", "_reserve")

    def __init__(self, reserve: Callable[[], None], release: Callable[[], None]) -> None:
        self._reserve = reserve
        self._release = release

    def __enter__(self) -> None:
        self._reserve()

    def __exit__(self, *_: object) -> None:
        self._release()


class Ledger:
    """The ledger of one ingress. Create and use it on the event loop; creating it may block.

    Raises:
        OSError: the journal's folder cannot be written.
    """

    def __init__(self, folder: Path, settings: JournalSettings, store: Records) -> None:
        self.uncounted = 0
        """How many shed or refused requests have no record: the journal had no room and
        ``MOST_OWED`` others waited for it already, or the ledger was closed."""
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._room = _Room(self._reserve, self._release)
        self._lazy_at: asyncio.TimerHandle | None = None
        # Records of shed and refused requests that wait for room in the journal.
        self._owed: deque[Entry] = deque()
        self._pay_at: asyncio.TimerHandle | None = None
        # Tokens and time of the last written progress, by open stream.
        self._steps: dict[str, tuple[int, float]] = {}
        self._journal = Journal(folder, settings, self._durable, self._refused)
        self._flusher = Flusher(self._journal, folder, settings, store, self._journal.wake)

    def store_away_s(self, now: float) -> float:
        """Return for how long the database has been away at the monotonic time ``now``.

        In seconds; zero while records can be moved to it. Service goes on without it.
        """
        since = self._flusher.away_since
        return 0.0 if since is None else max(0.0, now - since)

    def backlog(self) -> Backlog:
        """Return what the journal holds that has not been moved to the store yet."""
        journal = self._journal
        return backlog_between(self._flusher.position, journal.written, dict(journal.ends))

    @property
    def limit_bytes(self) -> int:
        """Most disk space for the journals of this node."""
        return self._settings.max_bytes

    @property
    def journals_set_aside(self) -> int:
        """How many journals of this node are set aside, because parts of them are unreadable."""
        return self._flusher.adopter.kept

    @property
    def journals_failing(self) -> int:
        """How many dead ingresses' journals cannot be moved to the store at present."""
        return len(self._flusher.adopter.failing)

    def reserved(self) -> AbstractContextManager[None]:
        """Return a context that reserves room for a request's record. Enter it before serving.

        Raises, when entered:
            JournalFull: the journal has no room.
        """
        return self._room

    def _reserve(self) -> None:
        if not self.has_room:
            self._journal.wake()
            raise JournalFull
        if not self._in_flight:
            self._idle.clear()
        self._in_flight += 1
        self._journal.reserve(self._in_flight * RESERVED_BYTES)
        if self._in_flight % _WAKE_EVERY == 0:
            self._journal.wake()

    def _release(self) -> None:
        self._in_flight -= 1
        self._journal.reserve(self._in_flight * RESERVED_BYTES)
        if not self._in_flight:
            self._idle.set()

    @property
    def has_room(self) -> bool:
        """Whether another request can be recorded; if not, requests are refused."""
        return self._journal.has_room((self._in_flight + 1) * RESERVED_BYTES)

    def open(self, record: UsageRecord) -> Opening:
        """Start to write the open record of a stream. The engine can be called meanwhile.

        The stream must then be settled in every case. A request that moves to another replica is
        opened again, and the new record replaces the first.
        """
        assert record.state is State.OPEN
        request_id = record.origin.request_id
        self._steps[request_id] = (0, time.monotonic())
        kept = self._write(Kind.OPEN, request_id, record.to_json())
        if self._journal.failing and not kept.done():
            kept.set_result(False)
        return Opening(kept)

    def progress(self, request_id: str, usage: TokenUsage, estimated: bool = False) -> float:
        """Update the usage of an open stream; it is written after some tokens or seconds.

        Returns when the next update is due, by the monotonic clock, if few tokens come until then.

        Args:
            request_id: the stream's request id.
            usage: its tokens so far.
            estimated: whether the tokens are Frontline's estimate and not the engine's count.
        """
        tokens, since = self._steps[request_id]
        generated, now = usage.completion_tokens, time.monotonic()
        pause_s = self._settings.progress_s
        few = generated - tokens < self._settings.progress_tokens
        if few and (generated == tokens or now - since < pause_s):
            return since + pause_s
        if not self._journal.has_room(self._in_flight * RESERVED_BYTES):
            # The remaining room is for the records themselves.
            return since + pause_s
        self._steps[request_id] = (generated, now)
        step = Progress(request_id, usage, now_utc(), estimated)
        self._write_lazily(Entry.of(step.kind, request_id, step.to_json()))
        return now + pause_s

    async def settle(self, record: UsageRecord) -> None:
        """Write the settled record of a request. Send the last byte only when this has returned.

        The record is written even if waiting for it is cancelled.

        Raises:
            DiskRefuses: the record could not be written before the ledger was closed.
        """
        assert record.state is not State.OPEN
        request_id = record.origin.request_id
        self._steps.pop(request_id, None)
        if not await self._write(Kind.SETTLED, request_id, record.to_json()):
            raise DiskRefuses

    def write_off(self, record: UsageRecord) -> None:
        """Record a stream whose open record was refused by the disk. The call does not wait.

        No part of its answer has been sent. So a journal without this entry gives the same bill.
        """
        assert record.state.served and not record.cost
        request_id = record.origin.request_id
        self._steps.pop(request_id, None)
        self._write_lazily(Entry.of(Kind.SETTLED, request_id, record.to_json()))

    def count(self, record: UsageRecord) -> None:
        """Record a request that was shed or refused. The call does not wait.

        While the journal has no room, up to ``MOST_OWED`` of these records are kept in memory.
        """
        assert not record.state.served
        if self._journal.ended or len(self._owed) >= MOST_OWED:
            self.uncounted += 1
            return
        self._owed.append(Entry.of(Kind.SETTLED, record.origin.request_id, record.to_json()))
        if self._pay_at is None:
            self._pay()

    def _pay(self) -> None:
        """Write the records kept in memory, as far as there is room; retry later for the rest."""
        self._pay_at = None
        room = self._journal.room - (self._in_flight + 1) * RESERVED_BYTES
        while self._owed and (room := room - len(self._owed[0].line)) >= 0:
            self._write_lazily(self._owed.popleft())
        if self._owed:
            # This also requests space.
            self._journal.wake()
            self._pay_at = self._loop.call_later(PAY_S, self._pay)

    async def retire(self) -> None:
        """Close the ledger once all requests with reserved room have ended."""
        await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Write all entries and move them to the store. Another ingress moves what remains."""
        self._pay()
        for timer in (self._lazy_at, self._pay_at):
            if timer is not None:
                timer.cancel()
        if self._owed:
            self.uncounted += len(self._owed)
            _log.error("the ledger ends without %d records of requests turned away, for want of "
                       "room in the journal", len(self._owed))  # fmt: skip
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._flusher.stop()
        self._journal.close()
        done = self._flusher.finish() and not self._journal.unfinished
        self._journal.release(remove=done)

    def _write(self, kind: Kind, request_id: str, body: bytes) -> asyncio.Future[bool]:
        """Have an entry written now; the result is whether it is durable or was refused."""
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._journal.append(Entry.of(kind, request_id, body, waiter))
        self._journal.wake()
        if self._journal.ended and not waiter.done():
            # The journal has ended and will not write it.
            waiter.set_result(False)
        return waiter

    def _write_lazily(self, entry: Entry) -> None:
        self._journal.append(entry)
        if self._lazy_at is None:
            self._lazy_at = self._loop.call_later(LAZY_S, self._wake)

    def _wake(self) -> None:
        self._lazy_at = None
        self._journal.wake()

    def _durable(self, waiters: list[asyncio.Future[bool]]) -> None:
        """Called on the journal's thread."""
        self._notify(waiters, True)

    def _refused(self, waiters: list[asyncio.Future[bool]]) -> None:
        """Called on the journal's thread."""
        self._notify(waiters, False)

    def _notify(self, waiters: list[asyncio.Future[bool]], durable: bool) -> None:
        if waiters:
            # Raised if the loop is closed; then no task waits any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_resolve, waiters, durable)


def open_ledger(store: Engine, settings: JournalSettings) -> Ledger:
    """Return a ledger for a database, which may be away. The caller keeps owning ``store``.

    Raises:
        SettingsError: the journal's folder names a variable that is not set.
        OSError: the journal's folder cannot be written.
    """
    return Ledger(Path(expand_path(settings.folder)), settings, RecordStore(store))


def _resolve(waiters: list[asyncio.Future[bool]], durable: bool) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(durable)
