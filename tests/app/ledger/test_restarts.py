"""The ledger's threads fail at any of their steps: they go on, and lose nothing."""

import asyncio
import linecache
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import supervision
from app.config.journal import JournalSettings
from app.core.pricing import TokenUsage
from app.ledger.codec import Kind, Progress
from app.ledger.journal import Entry, Journal
from app.ledger.ledger import DiskRefuses, JournalFull, Ledger
from app.ledger.record import State
from app.ledger.segments import SegmentFile
from app.supervision import PROCESS, keep_thread
from tests.support.records import NOON, completed, opened
from tests.support.stores import MemoryStore, adopt
from tests.support.waiting import until

pytestmark = pytest.mark.unit

QUICK = JournalSettings(segment_mb=1, flush_interval_s=0.01, adopt_interval_s=0.05)
FILES = (
    "app/ledger/journal.py",
    "app/ledger/segments.py",
    "app/ledger/flusher.py",
    "app/ledger/adoption.py",
)


class Broken(Exception):
    """What nobody expects."""


class SmallSegments(JournalSettings):
    """Segments of a few records, so that a new one is begun often."""

    @property
    def segment_bytes(self) -> int:
        return 4096


@pytest.fixture(autouse=True, scope="module")
def short_pauses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision, "FIRST_PAUSE_S", 0.001)
        patch.setattr(supervision, "LONGEST_PAUSE_S", 0.002)
        yield


class Faults:
    """Has a thread of the ledger fail in the given functions.

    Each fault is a function's name and how many of its lines are run before the failing one.
    """

    def __init__(self, thread, faults):
        self.left = [list(fault) for fault in faults]
        self._thread = thread

    def keep_thread(self, name, work, **more):
        def run():
            if name == self._thread:
                sys.settrace(self._trace)
            try:
                work()
            finally:
                sys.settrace(None)

        return keep_thread(name, run, **more)

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line" and not _leaves_block(frame):
            for fault in self.left:
                if fault[0] == frame.f_code.co_name:
                    fault[1] -= 1
                    if fault[1] < 0:
                        self.left.remove(fault)
                        raise Broken
        return self._trace


def _leaves_block(frame):
    """Whether it may be about to leave a block, where to fail is not to leave it."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


@contextmanager
def faults(thread, given):
    made = Faults(thread, given)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("journal", "flusher"):
            patch.setattr(f"app.ledger.{module}.keep_thread", made.keep_thread)
        yield made


class Writer:
    """A journal with small segments, and who has been told what."""

    def __init__(self, folder):
        self.durable, self.refused, self.waiting = set(), set(), set()
        self.journal = Journal(folder, SmallSegments(), self.durable.update, self.refused.update)

    def append(self, kind, request_id, body):
        waiter = None if kind is Kind.PROGRESS else (kind, request_id, len(self.waiting))
        if waiter is not None:
            self.waiting.add(waiter)
        self.journal.append(Entry.of(kind, request_id, body, waiter))

    def commit(self):
        self.journal.wake()
        deadline = time.monotonic() + 5
        while not self.waiting <= self.durable:
            assert time.monotonic() < deadline, "somebody waits for ever"
            time.sleep(0.001)


operations = st.lists(
    st.sampled_from(["open", "progress", "settle", "unary", "commit"]), min_size=10, max_size=40
)
# private: a fault is a line of a function that the thread runs, and most of them are private.
JOURNAL = (
    "_run", "_keep_writing", "_wait", "_write_batches", "_take", "_write_until_done",
    "_try_to_write", "_place", "_turn", "_create", "__init__", "write", "sync", "_write_at",
    "_note", "_remember", "_note_success",
)  # fmt: skip
SPACE = ("_keep_space", "_allocate", "_take_segment", "_create", "__init__", "bytes_taken")
FLUSHER = (
    "_run", "_round", "flush", "_flush_segment", "_remove_what_is_not_needed",
    "adopt", "_journals", "_adopt_if_dead",
)  # fmt: skip


def faults_in(functions):
    fault = st.tuples(st.sampled_from(functions), st.integers(0, 15))
    return st.lists(fault, min_size=5, max_size=25)


threads = st.one_of(
    st.tuples(st.just("ledger-journal"), faults_in(JOURNAL)),
    st.tuples(st.just("ledger-space"), faults_in(SPACE)),
)


@given(operations, threads)
def test_wherever_a_thread_of_the_journal_fails_every_entry_is_written(
    tmp_path_factory, operations, thread
):
    folder, running, settled, at = tmp_path_factory.mktemp("journal"), {}, {}, {}
    with faults(*thread) as injected:
        ours = Writer(folder)
        try:
            for number, operation in enumerate(operations):
                match operation:
                    case "open":
                        record = opened(f"stream-{number}")
                        running[record.origin.request_id] = record
                        ours.append(Kind.OPEN, record.origin.request_id, record.to_json())
                    case "progress" if running:
                        name = next(reversed(running))
                        at[name] = number
                        step = Progress(name, TokenUsage(1, 0, number), NOON)
                        ours.append(Kind.PROGRESS, name, step.to_json())
                    case "settle" if running:
                        name, record = running.popitem()
                        settled[name] = record.settle(
                            State.COMPLETED, TokenUsage(1, 1, 1), ended=NOON
                        )
                        ours.append(Kind.SETTLED, name, settled[name].to_json())
                    case "unary":
                        name = f"unary-{number}"
                        settled[name] = completed(name)
                        ours.append(Kind.SETTLED, name, settled[name].to_json())
                    case "commit":
                        ours.commit()
            ours.commit()
            assert not ours.refused - {w for w in ours.waiting if w[0] is Kind.OPEN}
        finally:
            injected.left.clear()
            ours.journal.close()
            ours.journal.release(remove=False)
    store = MemoryStore()
    adopt(folder, store)
    left = {name: store.records.pop(name).usage.completion_tokens for name in running}
    assert left == {name: at.get(name, 0) for name in running}
    assert store.records == settled


def failures(name):
    failed = PROCESS.failures().get(name)
    return 0 if failed is None else failed.count


async def test_while_the_journal_fails_open_records_are_refused_and_the_rest_waits(
    tmp_path, monkeypatch
):
    """568732b: the thread ended in silence, and whoever waited for it did so for ever."""
    broken, write = threading.Event(), SegmentFile.write
    broken.set()

    def unless_broken(segment, data):
        if broken.is_set():
            raise Broken
        write(segment, data)

    monkeypatch.setattr(SegmentFile, "write", unless_broken)
    store, before = MemoryStore(), failures("ledger-journal")
    ours = Ledger(tmp_path, QUICK, store)
    begun, ended = ours.open(opened("stream")), asyncio.create_task(ours.settle(completed("unary")))
    async with asyncio.timeout(5):
        with pytest.raises(DiskRefuses):
            await begun
    await until(lambda: failures("ledger-journal") > before + 2)
    assert not ours.has_room and not ended.done()
    with pytest.raises(JournalFull), ours.reserved():
        pass
    broken.clear()
    async with asyncio.timeout(5):
        await ended
    await until(lambda: ours.has_room)
    await ours.settle(completed("after"))
    await ours.close()
    assert set(store.records) == {"unary", "after"}


async def test_a_journal_that_keeps_failing_is_closed_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 60)
    monkeypatch.setattr(supervision, "LONGEST_PAUSE_S", 60)

    def broken(segment, data):
        raise Broken

    monkeypatch.setattr(SegmentFile, "write", broken)
    ours = Ledger(tmp_path, QUICK, MemoryStore())
    ended = asyncio.create_task(ours.settle(completed("unary")))
    await until(lambda: not ours.has_room)
    async with asyncio.timeout(5):
        await ours.close()
        # It was not written, and so must not be said to be.
        with pytest.raises(DiskRefuses):
            await ended
        with pytest.raises(DiskRefuses):
            await ours.settle(completed("late"))
        with pytest.raises(DiskRefuses):
            await ours.open(opened("late"))
    assert "ends without 1 entries" in caplog.text
    assert list(tmp_path.iterdir()), "what may be in it is left to another ingress"


async def test_a_round_of_the_flusher_that_fails_is_counted_and_done_again(tmp_path, caplog):
    """568732b: the thread ended in silence, nothing reached the store, `store_away_s` was 0."""

    class Surprising(MemoryStore):
        def add(self, bodies):
            if self.away:
                raise Broken
            super().add(bodies)

        def prepare(self):
            pass

    store, before = Surprising(), failures("ledger-flusher")
    store.away = True
    ours = Ledger(tmp_path, QUICK, store)
    assert ours.store_away_s(time.monotonic()) == 0
    begun = time.monotonic()
    await ours.settle(completed("one"))
    await until(lambda: failures("ledger-flusher") > before + 2)
    away_s = ours.store_away_s(time.monotonic())
    assert 0 < away_s <= time.monotonic() - begun
    await ours.settle(completed("two"))
    assert ours.store_away_s(time.monotonic()) > away_s
    store.away = False
    await until(lambda: len(store.records) == 2)
    await until(lambda: ours.store_away_s(time.monotonic()) == 0)
    store.away = True
    await ours.settle(completed("three"))
    async with asyncio.timeout(5):
        await ours.close()
    store.away = False
    adopt(tmp_path, store)
    assert set(store.records) == {"one", "two", "three"}


@given(faults_in(FLUSHER), st.integers(1, 30))
def test_wherever_the_flusher_fails_every_record_reaches_the_store(tmp_path_factory, given, many):
    folder, store = tmp_path_factory.mktemp("journal"), MemoryStore()

    async def run():
        with faults("ledger-flusher", given):
            ours = Ledger(folder, QUICK, store)
            for number in range(many):
                await ours.settle(completed(f"r{number}"))
            await until(lambda: len(store.records) == many)
            await ours.close()

    asyncio.run(run())
    assert set(store.records) == {f"r{number}" for number in range(many)}
