import errno
import math
import os
import shutil
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import alarms
from app.config.journal import JournalSettings
from app.core.pricing import TokenUsage
from app.ledger.codec import Kind, Progress, read_segment
from app.ledger.flusher import OwnJournal
from app.ledger.journal import Entry, Journal
from app.ledger.reading import request_of
from app.ledger.record import State
from app.ledger.segments import (
    SegmentFile,
    bytes_taken,
    count_kept,
    segment_numbers,
    segment_path,
)
from app.store.database import StoreAway
from tests.support.records import NOON, completed, new_id, opened
from tests.support.stores import MemoryStore, adopt

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


@pytest.fixture(autouse=True, scope="module")
def small_batches():
    """Transactions of two records, so that a test sees a flush that ends in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.ledger.flusher.BATCH", 2)
        patch.setattr("app.ledger.adoption.BATCH", 2)
        yield


class SmallSegments(JournalSettings):
    """Segments of a few records, so that a test sees many."""

    @property
    def segment_bytes(self) -> int:
        return 4096


class Writer:
    """A journal, and what it has acknowledged."""

    def __init__(self, folder, settings=None):
        self.acknowledged = []
        self.refused = []
        self._all_done = threading.Event()
        self._waiting = 0
        self.folder = folder
        self.journal = Journal(
            folder, settings or SmallSegments(), self._durable, self.refused.extend
        )

    def _durable(self, waiters):
        self.acknowledged += waiters
        self._all_done.set()

    def append(self, kind, request_id, body):
        waiter = (kind, request_id)
        self._waiting += 1
        self.journal.append(Entry.of(kind, request_id, body, waiter))

    def commit(self, timeout_s=10):
        self.journal.wake()
        deadline = time.monotonic() + timeout_s
        while len(self.acknowledged) < self._waiting:
            self._all_done.clear()
            if len(self.acknowledged) < self._waiting:
                self._all_done.wait(0.05)
            assert time.monotonic() < deadline

    def settle(self, record):
        self.append(Kind.SETTLED, record.origin.request_id, record.to_json())

    def open(self, record):
        self.append(Kind.OPEN, record.origin.request_id, record.to_json())

    def close(self):
        self.journal.close()
        self.journal.release(remove=False)


@contextmanager
def writer(folder, settings=None):
    made = Writer(folder, settings)
    try:
        yield made
    finally:
        with suppress(OSError):
            made.close()


def test_what_is_acknowledged_is_in_the_file(tmp_path):
    with writer(tmp_path) as ours:
        records = [completed() for _ in range(30)]
        for record in records:
            ours.settle(record)
        ours.commit()
        journal = ours.journal.path
        bodies = [
            found.body
            for number in segment_numbers(journal)
            for found in read_segment(segment_path(journal, number).read_bytes()).frames
        ]
        assert bodies == [record.to_json() for record in records]


def test_flushed_segments_go_and_their_space_comes_back(tmp_path):
    store = MemoryStore()
    with writer(tmp_path) as ours:
        flusher = OwnJournal(ours.journal)
        for _ in range(20):
            for _ in range(5):
                ours.settle(completed())
            ours.commit()
            flusher.flush(store)
        assert len(store.records) == 100
        assert bytes_taken(tmp_path) <= 4 * 4096


def test_a_flush_that_ends_in_the_middle_goes_on_there(tmp_path):
    store, records = MemoryStore(), [completed() for _ in range(5)]
    with writer(tmp_path) as ours:
        flusher = OwnJournal(ours.journal)
        for record in records:
            ours.settle(record)
        ours.commit()
        store.left = 1
        with pytest.raises(StoreAway):
            flusher.flush(store)
        assert list(store.records.values()) == records[:2]
        store.left = math.inf
        assert flusher.flush(store) == 3
        assert list(store.records.values()) == records


def test_a_stream_outlives_the_segment_that_it_began_in(tmp_path):
    """Its segment has gone when its ingress dies: what is open is written again in each."""
    store, record = MemoryStore(), opened("stream")
    with writer(tmp_path) as ours:
        flusher = OwnJournal(ours.journal)
        ours.open(record)
        step = Progress("stream", TokenUsage(7, 0, 3), NOON)
        ours.journal.append(Entry.of(Kind.PROGRESS, "stream", step.to_json()))
        for _ in range(40):
            ours.settle(completed())
            ours.commit()
            flusher.flush(store)
        assert segment_numbers(ours.journal.path)[0] > 3
    adopt(tmp_path, store)
    assert store.records["stream"].state is State.INTERRUPTED
    assert store.records["stream"].usage == step.usage
    assert len(store.records) == 41


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("flushed", [0, 17])
@pytest.mark.parametrize("where", [0, 0.2, 0.5, 0.8, 1])
def test_a_bad_frame_of_the_own_journal_is_kept_aside_and_told(tmp_path, flushed, where, length):
    """59dfe9e: it was passed over, and its file removed: a bill less, and nobody was told."""
    store, records = MemoryStore(), [completed(f"{number:03d}") for number in range(30)]
    with writer(tmp_path) as ours:
        flusher = OwnJournal(ours.journal)
        for record in records[:flushed]:
            ours.settle(record)
        ours.commit()
        flusher.flush(store)
        moved = ours.journal.written
        for count, record in enumerate(records[flushed:]):
            ours.settle(record)
            if count % 5 == 4:
                ours.commit()
        ours.commit()
        number, start, end = draw_written(ours.journal, moved, where)
        before = spoil(segment_path(ours.journal.path, number), start, end, where, length)
        flusher.flush(store)
        assert alarms.PROCESS.counts() == {"journal damaged": 1}
        for later in range(60):
            ours.settle(completed(f"later {later}"))
            if later % 5 == 4:
                ours.commit()
        flusher.flush(store)
        assert len(segment_numbers(ours.journal.path)) < 4, "full ones are removed all the same"
    lost = {record.origin.request_id for record in records} - store.records.keys()
    assert len(lost) <= 2, "no more than the frames that were touched"
    (aside,) = (tmp_path / f"{ours.journal.path.name}.own.damaged").iterdir()
    assert aside.name == segment_path(tmp_path, number).name
    assert set(before) >= lost and count_kept(tmp_path) == 1


def draw_written(journal, moved, where):
    """Return a segment with entries after this position, and where they begin and end."""
    ends = journal.ends | {journal.written.segment: journal.written.size}
    starts = {moved.segment: moved.size}
    places = [
        (number, start, end)
        for number, end in sorted(ends.items())
        if number >= moved.segment and (start := starts.get(number, 0)) < end
    ]
    return places[min(int(where * len(places)), len(places) - 1)]


def spoil(path, start, end, where, length):
    """Write over some bytes in between, and return the requests whose frames had them."""
    data = path.read_bytes()
    place = start + int(where * max(end - start - 1, 0))
    touched, begins, before = range(place, min(place + length, end)), start, []
    for found in read_segment(data[start:end]).frames:
        # A frame is found by the line break before it.
        if begins - 1 <= touched[-1] and start + found.end > touched[0]:
            before.append(request_of(found.body))
        begins = start + found.end
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(byte ^ 1 for byte in data[place : touched.stop]))
    return before


def test_a_living_journal_is_not_adopted(tmp_path):
    store = MemoryStore()
    with writer(tmp_path) as ours:
        ours.open(opened("stream"))
        ours.commit()
        assert adopt(tmp_path, store) == 0
    assert adopt(tmp_path, store) == 1
    assert list(tmp_path.iterdir()) == []


def test_adoption_that_is_broken_off_is_done_again(tmp_path):
    store = MemoryStore()
    with writer(tmp_path) as ours:
        for _ in range(10):
            ours.settle(completed())
        ours.open(opened("stream"))
        ours.commit()
    for trouble in ("away", "lose_answer"):
        setattr(store, trouble, True)
        with pytest.raises(StoreAway):
            adopt(tmp_path, store)
        setattr(store, trouble, False)
    adopt(tmp_path, store)
    assert len(store.records) == 11


def test_a_journal_whose_removal_is_broken_off_anywhere_goes_in_the_end(tmp_path, monkeypatch):
    remaining = 0

    def unless_killed(remove):
        def removed(path):
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                raise KeyboardInterrupt
            remove(path)

        return removed

    monkeypatch.setattr(Path, "unlink", unless_killed(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", unless_killed(Path.rmdir))
    broken_off = 0
    while True:
        remaining, store = 1000, MemoryStore()
        with writer(tmp_path) as ours:
            for _ in range(20):
                ours.settle(completed())
                ours.commit()
        remaining = broken_off
        with suppress(KeyboardInterrupt):
            adopt(tmp_path, store)
        finished, remaining = remaining >= 0, 1000
        adopt(tmp_path, store)
        assert list(tmp_path.iterdir()) == []
        assert len(store.records) == 20
        if finished:
            break
        broken_off += 1
    assert broken_off > 3, "the lock, the folder, and a segment or two"


def test_a_damaged_journal_is_kept_aside_and_the_rest_of_it_settled(tmp_path, caplog):
    store, records = MemoryStore(), [completed() for _ in range(3)]
    with writer(tmp_path, JournalSettings()) as ours:
        for record in records:
            ours.settle(record)
        ours.commit()
        path = segment_path(ours.journal.path, 1)
    data = bytearray(path.read_bytes())
    data[len(records[0].to_json()) + 60] ^= 1
    path.write_bytes(data)
    adopt(tmp_path, store)
    kept = {r.origin.request_id for r in (records[0], records[2])}
    assert set(store.records) == kept
    (aside,) = tmp_path.iterdir()
    assert aside.name.endswith(".damaged") and "damaged" in caplog.text
    assert adopt(tmp_path, store) == 0


class FailingDisk:
    """Lets the journal's writes or syncs fail; what was to be synced is then lost."""

    def __init__(self, monkeypatch):
        self.fails = ""
        self._pwrite, self._fdatasync = os.pwrite, os.fdatasync
        self._unsynced = []
        monkeypatch.setattr("app.ledger.segments.os.pwrite", self._write)
        monkeypatch.setattr("app.ledger.segments.os.fdatasync", self._sync)

    def _write(self, file, data, place):
        if self.fails == "pwrite":
            self._pwrite(file, bytes(data)[: len(data) // 2], place)
            raise OSError(errno.EIO, "broken")
        self._unsynced.append((file, len(data), place))
        return self._pwrite(file, data, place)

    def _sync(self, file):
        if self.fails == "fdatasync":
            for unsynced, length, place in self._unsynced:
                self._pwrite(unsynced, bytes(length), place)
            raise OSError(errno.EIO, "broken")
        self._unsynced.clear()
        self._fdatasync(file)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_failing_disk_loses_nothing_and_admits_nobody(tmp_path, monkeypatch, call, caplog):
    disk, store = FailingDisk(monkeypatch), MemoryStore()
    with writer(tmp_path) as ours:
        records = [completed() for _ in range(3)]
        ours.settle(records[0])
        ours.commit()
        wait_for_spare(ours.journal)
        disk.fails = call
        ours.settle(records[1])
        ours.settle(records[2])
        with pytest.raises(AssertionError):
            ours.commit(timeout_s=0.3)
        assert ours.journal.failing and ours.journal.room == 0
        assert ours.refused == []
        assert ours.acknowledged == [(Kind.SETTLED, records[0].origin.request_id)]
        disk.fails = ""
        ours.commit()
        assert not ours.journal.failing and ours.journal.room > 0
        assert segment_numbers(ours.journal.path) == [1, 2]
        OwnJournal(ours.journal).flush(store)
    assert list(store.records.values()) == records
    assert "503" in caplog.text


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_failing_disk_refuses_those_who_wait_for_open_records_alone(tmp_path, monkeypatch, call):
    disk, store = FailingDisk(monkeypatch), MemoryStore()
    with writer(tmp_path) as ours:
        ours.settle(completed("before"))
        ours.commit()
        wait_for_spare(ours.journal)
        disk.fails = call
        stream, unary = opened("stream"), completed("unary")
        ours.open(stream)
        ours.settle(unary)
        ours.journal.wake()
        wait_until(lambda: (Kind.OPEN, "stream") in ours.refused)
        # One that comes behind the batch that cannot be written.
        ours.open(opened("behind"))
        wait_until(lambda: (Kind.OPEN, "behind") in ours.refused)
        assert {name for _, name in ours.refused} == {"stream", "behind"}
        assert ours.acknowledged == [(Kind.SETTLED, "before")]
        disk.fails = ""
        ours.settle(stream.settle(State.FAILED, TokenUsage(0, 0, 0), ended=NOON, reason="disk"))
        ours.commit()
        OwnJournal(ours.journal).flush(store)
        assert set(store.records) == {"before", "unary", "stream"}
    adopt(tmp_path, store)
    assert {name: r.state for name, r in store.records.items()} == {
        "before": State.COMPLETED, "unary": State.COMPLETED, "stream": State.FAILED,
        "behind": State.INTERRUPTED,
    }  # fmt: skip


def test_a_segments_space_is_written_and_not_only_reserved(tmp_path):
    """Else each sync would change the file system's own books, and wait for others' writes."""
    made = SegmentFile(tmp_path, 1, 3 * MIB + 5)
    with segment_path(tmp_path, 1).open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 3 * MIB + 5
    made.discard()


def test_no_record_waits_for_the_making_of_a_segment(tmp_path, monkeypatch):
    class SlowlyMade(SegmentFile):
        def __init__(self, journal, number, allocated):
            if number > 1:
                time.sleep(1)
            super().__init__(journal, number, allocated)

    monkeypatch.setattr("app.ledger.journal.SegmentFile", SlowlyMade)
    with writer(tmp_path) as ours:
        for _ in range(3):
            ours.settle(completed())
            ours.commit(timeout_s=0.9)
        wait_for_spare(ours.journal)


def wait_for_spare(journal):
    """Space is taken aside, and a segment's file is there before all of its space is."""
    wait_until(lambda: journal.room >= SmallSegments().segment_bytes)


def wait_until(condition, timeout_s=5):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_bound_holds_and_space_comes_back(tmp_path, caplog):
    settings = JournalSettings(max_mb=8, segment_mb=1)
    store = MemoryStore()
    with writer(tmp_path, settings) as ours:
        while ours.journal.room >= 64 * 1024:
            for _ in range(50):
                ours.settle(completed())
            ours.commit()
        assert bytes_taken(tmp_path) <= 8 * MIB
        assert caplog.text.count("max_mb") == 1
        assert len(ours.acknowledged) > 8 * MIB / 1000
        OwnJournal(ours.journal).flush(store)
        ours.journal.wake()
        deadline = time.monotonic() + 5
        while ours.journal.room < MIB:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(store.records) == len(ours.acknowledged)


operations = st.lists(
    st.sampled_from(
        ["open", "progress", "settle", "unary", "commit", "flush", "away", "back", "flaky", "lost"]
    ),
    min_size=1,
    max_size=60,
)


@given(operations, st.floats(0, 1), st.booleans())
def test_any_interleaving_and_a_crash_give_each_record_once(
    tmp_path_factory, operations, cut, torn
):
    """The crash: the journal as it was, its last bytes after what was acknowledged cut off."""
    folder = tmp_path_factory.mktemp("journal")
    store = MemoryStore()
    ours = Writer(folder / "live")
    flusher = OwnJournal(ours.journal)
    running, tokens = [], 0
    # What may be found of each request, in the order in which it became true.
    history, durable = defaultdict(list), {}
    try:
        for operation in operations:
            match operation:
                case "open":
                    record = opened(new_id())
                    ours.open(record)
                    running.append(record)
                    history[record.origin.request_id].append(0)
                case "progress" if running:
                    tokens += 1
                    name = running[-1].origin.request_id
                    step = Progress(name, TokenUsage(1, 0, tokens), NOON)
                    ours.append(Kind.PROGRESS, name, step.to_json())
                    history[name].append(tokens)
                case "settle" if running:
                    record = running.pop(0).settle(State.COMPLETED, TokenUsage(1, 1, 1), ended=NOON)
                    ours.settle(record)
                    history[record.origin.request_id].append(record)
                case "unary":
                    record = completed(new_id())
                    ours.settle(record)
                    history[record.origin.request_id].append(record)
                case "commit":
                    ours.commit()
                    durable = {name: len(steps) - 1 for name, steps in history.items()}
                case "flush":
                    with suppress(StoreAway):
                        flusher.flush(store)
                case "away" | "back":
                    store.away, store.left = operation == "away", math.inf
                case "flaky":
                    store.left = 1
                case "lost":
                    store.lose_answer = not store.lose_answer
        ours.commit()
        acknowledged = durable == {name: len(steps) - 1 for name, steps in history.items()}
        copy = crash(ours.journal, folder / "dead", cut, torn and not acknowledged)
    finally:
        ours.close()
    store.away, store.lose_answer, store.left = False, False, math.inf
    adopt(copy, store)
    assert adopt(copy, store) == 0
    assert set(durable) <= set(store.records) <= set(history)
    for name, found in store.records.items():
        broken_off = found.state is State.INTERRUPTED
        outcome = found.usage.completion_tokens if broken_off else found
        assert outcome in history[name][durable.get(name, 0) :]


def crash(journal, folder, cut, torn):
    """Copy a journal as a crash may leave it: of the last entry, only some bytes are there."""
    copy = folder / journal.path.name
    shutil.copytree(journal.path, copy)
    if torn:
        position = journal.written
        path = segment_path(copy, position.segment)
        data = path.read_bytes()
        frames = read_segment(data[: position.size]).frames
        begin = frames[-2].end if len(frames) > 1 else 0
        keep = begin + int((position.size - begin) * cut)
        path.write_bytes(data[:keep] + bytes(len(data) - keep))
    return folder
