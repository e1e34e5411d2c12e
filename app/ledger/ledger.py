"""The ledger: what every request cost, durable before its answer has left.

    reserve ─> open ─> progress … ─> settle      a stream
    reserve ─> settle                            a unary answer
    reserve ─> open ─> write_off                 a stream whose open record the disk refused
    count                                        a request that was turned away

Awaiting what ``open`` returns, and ``settle``, ends once the record survives the death of any
process and a loss of power. None of it waits for the database (``app.ledger.flusher``) or costs a
task.
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
from app.ledger.codec import Kind, Progress
from app.ledger.dead_letter import Records
from app.ledger.flusher import Flusher
from app.ledger.journal import LAZY_S, Entry, Journal
from app.ledger.record import State, UsageRecord, now_utc
from app.ledger.record_store import RecordStore

RESERVED_BYTES: Final = 4096
"""Room that a request needs in the journal: two records, another open one where its engine was
lost, a copy of that in the next segment, and a few steps of progress, 600 bytes a record with names
of usual length."""
MOST_OWED: Final = 4096
"""Records of requests that were turned away, kept in memory while the journal has no room: less
than 4 MiB, and minutes of a client that tries again as it is told."""
_PAY_S: Final = 0.2  # how often room for them is looked for
_WAKE_EVERY: Final = 256
# Space is taken ahead for twice as many requests as are under way: a burst must not outrun it.

_log = logging.getLogger(__name__)


class Unrecordable(Exception):
    """What a request costs cannot be written down, so it must not be served."""


class JournalFull(Unrecordable):
    """There is no room for another record.

    The store has been away for long, or the disk is full or fails.
    """


class DiskRefuses(Unrecordable):
    """A record could not be written after there was room for it."""


class Opening:
    """An open record on its way to the disk; awaited before the first byte of an answer leaves.

    Raises, when awaited:
        DiskRefuses: the disk has refused it, or refuses everything now.
    """

    __slots__ = ("_kept",)

    def __init__(self, kept: asyncio.Future[bool]) -> None:
        self._kept = kept

    def __await__(self) -> Generator[Any, None, None]:
        if not (yield from self._kept.__await__()):
            raise DiskRefuses


class _Room:
    """Room for one request more, for as long as it is entered. It may be entered many times."""

    __slots__ = ("_release", "_reserve")

    def __init__(self, reserve: Callable[[], None], release: Callable[[], None]) -> None:
        self._reserve = reserve
        self._release = release

    def __enter__(self) -> None:
        self._reserve()

    def __exit__(self, *_: object) -> None:
        self._release()


class Ledger:
    """The ledger of one ingress. To be made and used on its event loop; may block when made.

    Raises:
        OSError: the journal's folder cannot be written.
    """

    def __init__(self, folder: Path, settings: JournalSettings, store: Records) -> None:
        self.uncounted = 0
        """How many requests were turned away without a record: the journal had no room, and
        ``MOST_OWED`` others waited for it already, or the ledger was closed."""
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._room = _Room(self._reserve, self._release)
        self._lazy_at: asyncio.TimerHandle | None = None
        # Records of requests that were turned away, which wait for room in the journal.
        self._owed: deque[Entry] = deque()
        self._pay_at: asyncio.TimerHandle | None = None
        # Tokens and time of the last step written down, by open stream.
        self._steps: dict[str, tuple[int, float]] = {}
        self._journal = Journal(folder, settings, self._durable, self._refused)
        self._flusher = Flusher(self._journal, folder, settings, store, self._journal.wake)

    @property
    def store_away(self) -> bool:
        """Whether records could not be moved to the database last time. Service goes on."""
        return self._flusher.away

    def store_away_s(self, now: float) -> float:
        """Return for how long it has been so at the monotonic time ``now``, in seconds."""
        since = self._flusher.away_since
        return 0.0 if since is None else max(0.0, now - since)

    @property
    def journals_set_aside(self) -> int:
        """How many journals of this node are set aside, since not all of them can be read."""
        return self._flusher.adopter.kept

    @property
    def journals_failing(self) -> int:
        """How many dead ingresses' journals cannot be moved to the store at present."""
        return len(self._flusher.adopter.failing)

    def reserved(self) -> AbstractContextManager[None]:
        """Keep room for a request's record in a block; to be entered before serving it.

        Raises, when entered:
            JournalFull: there is no room.
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
        """Whether another request could be written down; without it requests are refused."""
        return self._journal.has_room((self._in_flight + 1) * RESERVED_BYTES)

    def open(self, record: UsageRecord) -> Opening:
        """Begin to write down that a stream begins; its engine can be asked meanwhile.

        Whatever becomes of the stream, it is then to be settled. A request that is moved to another
        replica is opened again, and that record takes the place of the first.
        """
        assert record.state is State.OPEN
        request_id = record.origin.request_id
        self._steps[request_id] = (0, time.monotonic())
        kept = self._write(Kind.OPEN, request_id, record.to_json())
        if self._journal.failing and not kept.done():
            kept.set_result(False)
        return Opening(kept)

    def progress(self, request_id: str, usage: TokenUsage, estimated: bool = False) -> None:
        """Take note of how far an open stream has got; written down now and then.

        Args:
            request_id: the stream's.
            usage: its tokens so far.
            estimated: whether they are Frontline's estimate and not the engine's count.
        """
        tokens, since = self._steps[request_id]
        generated = usage.completion_tokens
        if generated - tokens < self._settings.progress_tokens:
            now = time.monotonic()
            if generated == tokens or now - since < self._settings.progress_s:
                return
        if not self._journal.has_room(self._in_flight * RESERVED_BYTES):
            # What is left is kept for the records themselves.
            return
        self._steps[request_id] = (generated, time.monotonic())
        step = Progress(request_id, usage, now_utc(), estimated)
        self._write_lazily(Entry.of(step.kind, request_id, step.to_json()))

    async def settle(self, record: UsageRecord) -> None:
        """Write down what became of a request; its last byte may leave when this returns.

        The record is written even where the wait for it is cancelled.

        Raises:
            DiskRefuses: the ledger was closed without it, which could not be written.
        """
        assert record.state is not State.OPEN
        request_id = record.origin.request_id
        self._steps.pop(request_id, None)
        if not await self._write(Kind.SETTLED, request_id, record.to_json()):
            raise DiskRefuses

    def write_off(self, record: UsageRecord) -> None:
        """Write down what became of a stream whose open record was refused; nobody waits for it.

        Nothing of its answer has left, so whoever opens the journal without this finds the same.
        """
        assert record.state.served and not record.cost
        request_id = record.origin.request_id
        self._steps.pop(request_id, None)
        self._write_lazily(Entry.of(Kind.SETTLED, request_id, record.to_json()))

    def count(self, record: UsageRecord) -> None:
        """Write down that a request was turned away; nobody waits for it.

        While the journal has no room, ``MOST_OWED`` of them are kept in memory until it has.
        """
        assert not record.state.served
        if self._journal.ended or len(self._owed) >= MOST_OWED:
            self.uncounted += 1
            return
        self._owed.append(Entry.of(Kind.SETTLED, record.origin.request_id, record.to_json()))
        if self._pay_at is None:
            self._pay()

    def _pay(self) -> None:
        """Write the records that are owed, as far as there is room; look again for the rest."""
        self._pay_at = None
        room = self._journal.room - (self._in_flight + 1) * RESERVED_BYTES
        while self._owed and (room := room - len(self._owed[0].line)) >= 0:
            self._write_lazily(self._owed.popleft())
        if self._owed:
            # Which asks for space, too.
            self._journal.wake()
            self._pay_at = self._loop.call_later(_PAY_S, self._pay)

    async def retire(self) -> None:
        """Close it once the requests that it keeps room for have ended."""
        await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Write and move what there is. What cannot be moved is left to another ingress."""
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
        """Have an entry written now; the result is whether it is durable, or was refused."""
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._journal.append(Entry.of(kind, request_id, body, waiter))
        self._journal.wake()
        if self._journal.ended and not waiter.done():
            # Nobody writes it any more.
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
        self._tell(waiters, True)

    def _refused(self, waiters: list[asyncio.Future[bool]]) -> None:
        """Called on the journal's thread."""
        self._tell(waiters, False)

    def _tell(self, waiters: list[asyncio.Future[bool]], durable: bool) -> None:
        if waiters:
            # A closed loop raises it: nobody waits there any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_resolve, waiters, durable)


def open_ledger(store: Engine, settings: JournalSettings) -> Ledger:
    """Return a ledger for a database, which need not be there yet, and stays the caller's.

    Raises:
        SettingsError: the journal's folder names a variable that is not set.
        OSError: the journal's folder cannot be written.
    """
    return Ledger(Path(expand_path(settings.folder)), settings, RecordStore(store))


def _resolve(waiters: list[asyncio.Future[bool]], durable: bool) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(durable)
