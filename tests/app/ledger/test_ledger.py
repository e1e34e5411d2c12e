import asyncio
import errno
import os
import time
from contextlib import ExitStack, asynccontextmanager

import pytest

from app.config.journal import JournalSettings
from app.core.pricing import TokenUsage
from app.core.settings import SettingsError
from app.ledger.codec import Kind, read_segment
from app.ledger.journal import Journal
from app.ledger.ledger import RESERVED_BYTES, DiskRefuses, JournalFull, Ledger, open_ledger
from app.ledger.leftovers import INGRESS_LOST
from app.ledger.record import State
from app.ledger.record_store import RecordStore, Wanted
from app.ledger.segments import segment_numbers, segment_path
from app.store.database import connect
from app.store.database_url import resolve_url
from tests.support.records import NOON, completed, new_id, opened, shed
from tests.support.stores import MemoryStore, adopt
from tests.support.waiting import until

pytestmark = pytest.mark.unit

QUICK = JournalSettings(flush_interval_s=0.02, adopt_interval_s=0.05)


@asynccontextmanager
async def ledger(folder, store, settings=QUICK):
    made = Ledger(folder, settings, store)
    try:
        yield made
    finally:
        await made.close()


def frames(folder):
    return [
        found
        for journal in folder.iterdir()
        for number in segment_numbers(journal)
        for found in read_segment(segment_path(journal, number).read_bytes()).frames
    ]


def steps(folder):
    return sum(found.kind is Kind.PROGRESS for found in frames(folder))


async def test_records_are_in_the_file_when_settle_returns_and_in_the_store_soon(tmp_path):
    store = MemoryStore()
    store.away = True
    async with ledger(tmp_path, store) as ours:
        record = completed()
        await ours.settle(record)
        assert [f.body for f in frames(tmp_path)] == [record.to_json()]
        await until(lambda: ours.store_away_s(time.monotonic()))
        store.away = False
        await until(lambda: store.records)
        await until(lambda: not ours.store_away_s(time.monotonic()))
    assert list(store.records.values()) == [record]
    assert list(tmp_path.iterdir()) == []


async def test_many_at_once_share_syncs(tmp_path, monkeypatch):
    syncs, real = [], os.fdatasync
    monkeypatch.setattr(
        "app.ledger.segments.os.fdatasync", lambda file: (syncs.append(file), real(file))
    )
    store = MemoryStore()
    async with ledger(tmp_path, store) as ours:
        await asyncio.gather(*(ours.settle(completed()) for _ in range(500)))
        assert len(syncs) < 50
    assert len(store.records) == 500


async def test_a_cancelled_wait_does_not_lose_the_record(tmp_path):
    store = MemoryStore()
    async with ledger(tmp_path, store) as ours:
        waiting = asyncio.create_task(ours.settle(completed("gone")))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
    assert "gone" in store.records


async def test_progress_is_written_once_a_step(tmp_path):
    settings = JournalSettings(progress_tokens=100, progress_s=1000)
    async with ledger(tmp_path, MemoryStore(), settings) as ours:
        await ours.open(opened("stream"))
        for tokens in range(1, 1001):
            ours.progress("stream", TokenUsage(5, 0, tokens))
        await until(lambda: steps(tmp_path) == 10)
        await asyncio.sleep(0.1)
        assert steps(tmp_path) == 10


async def test_slow_streams_are_written_by_time(tmp_path):
    settings = JournalSettings(progress_tokens=1000, progress_s=0.05)
    async with ledger(tmp_path, MemoryStore(), settings) as ours:
        await ours.open(opened("stream"))
        for tokens in (1, 1, 2, 2):
            await asyncio.sleep(0.06)
            ours.progress("stream", TokenUsage(5, 0, tokens))
        await until(lambda: steps(tmp_path) == 2)
        await asyncio.sleep(0.1)
        assert steps(tmp_path) == 2


async def test_what_was_turned_away_is_counted_without_waiting(tmp_path):
    store = MemoryStore()
    async with ledger(tmp_path, store) as ours:
        ours.count(shed("no"))
        await until(lambda: store.records)
        assert store.records["no"].served is None
    assert ours.uncounted == 0


async def test_open_streams_of_an_ingress_that_stops_are_settled_by_another(tmp_path):
    store = MemoryStore()
    async with ledger(tmp_path, store) as first:
        await first.open(opened("stream"))
    assert store.records == {}
    async with ledger(tmp_path, store):
        await until(lambda: store.records)
    assert store.records["stream"].reason == INGRESS_LOST


async def test_an_open_record_that_the_disk_refuses_is_not_waited_for(tmp_path, monkeypatch):
    broken, real = [True], os.fdatasync

    def sync(file):
        if broken:
            raise OSError(errno.EIO, "broken")
        real(file)

    monkeypatch.setattr("app.ledger.segments.os.fdatasync", sync)
    store, record = MemoryStore(), opened("stream")
    async with ledger(tmp_path, store) as ours:
        begun, ended = ours.open(record), asyncio.create_task(ours.settle(completed("unary")))
        with pytest.raises(DiskRefuses):
            async with asyncio.timeout(5):
                await begun
        with pytest.raises(DiskRefuses):
            await ours.open(opened("later"))
        with pytest.raises(JournalFull), ours.reserved():
            pass
        for one in (record, opened("later")):
            usage = TokenUsage(0, 0, 0)
            ours.write_off(one.settle(State.FAILED, usage, ended=NOON, reason="disk"))
        assert not ended.done(), "it has been served, and waits for its record"
        broken.clear()
        async with asyncio.timeout(5):
            await ended
            await ours.open(opened("after"))
        await until(lambda: len(store.records) == 3)
    assert {name: (r.state, r.cost) for name, r in store.records.items()} == {
        "unary": (State.COMPLETED, completed().cost),
        "stream": (State.FAILED, 0),
        "later": (State.FAILED, 0),
    }


async def test_without_room_nobody_is_served_and_room_comes_back(tmp_path, monkeypatch):
    """Requests that are turned away meanwhile are recorded then, as many as memory is for."""
    monkeypatch.setattr("app.ledger.ledger.MOST_OWED", 20)
    store = MemoryStore()
    store.away = True
    settings = JournalSettings(max_mb=8, segment_mb=1, flush_interval_s=0.02)
    async with ledger(tmp_path, store, settings) as ours:
        served = 0

        async def serve():
            nonlocal served
            with ours.reserved():
                await ours.settle(completed())
                served += 1

        with pytest.raises(JournalFull):
            while True:
                await asyncio.gather(*(serve() for _ in range(100)))
                assert served < 20_000
        assert served > 5000
        counted = 0
        while not ours.uncounted:
            ours.count(shed())
            counted += 1
            await asyncio.sleep(0.001)
            assert counted < 5000
        assert counted > 20
        store.away = False
        await until(lambda: len(store.records) == served + counted - 1, 60)

        async def has_room():
            with ours.reserved():
                return True

        deadline = time.monotonic() + 5
        while True:
            try:
                assert await has_room()
                break
            except JournalFull:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)


async def test_room_is_kept_for_everyone_who_was_let_in(tmp_path):
    """However many are under way when it gets full, each can be written."""
    store = MemoryStore()
    store.away = True
    settings = JournalSettings(max_mb=8, segment_mb=1)
    async with ledger(tmp_path, store, settings) as ours:
        streams = []
        with ExitStack() as under_way:
            with pytest.raises(JournalFull):
                while True:
                    under_way.enter_context(ours.reserved())
                    record = opened(new_id())
                    await ours.open(record)
                    streams.append(record)
            assert len(streams) > 8 * 1024 * 1024 / RESERVED_BYTES / 4
            # Progress without end must not take the room of their records.
            for tokens in range(300, 300 * 60, 300):
                for record in streams:
                    ours.progress(record.origin.request_id, TokenUsage(1, 0, tokens))
                await asyncio.sleep(0.06)
            for record in streams:
                ended = record.settle(State.COMPLETED, TokenUsage(1, 0, 1), ended=NOON)
                await ours.settle(ended)
            taken = sum(path.stat().st_size for path in tmp_path.glob("*/*.journal"))
            assert taken <= settings.max_bytes
        store.away = False
    adopt(tmp_path, store)
    assert {r.state for r in store.records.values()} == {State.COMPLETED}
    assert len(store.records) == len(streams)


async def test_a_burst_does_not_outrun_the_space(tmp_path, monkeypatch):
    made = []

    def journal(*arguments):
        made.append(Journal(*arguments))
        return made[0]

    monkeypatch.setattr("app.ledger.ledger.Journal", journal)
    async with ledger(tmp_path, MemoryStore(), JournalSettings(segment_mb=1)) as ours:
        with ExitStack() as under_way:
            for place in range(3000):
                under_way.enter_context(ours.reserved())
                if place % 100 == 0:
                    # So many more at once have room, whenever the disk has given it.
                    async with asyncio.timeout(10):
                        while made[0].room < (place + 102) * RESERVED_BYTES:
                            await asyncio.sleep(0.01)


async def test_a_ledger_is_opened_as_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("LEDGER_TEST", str(tmp_path))
    engine = connect(resolve_url("sqlite:///${LEDGER_TEST}/db/usage.db"))
    ours = open_ledger(engine, JournalSettings(folder="${LEDGER_TEST}/journal"))
    await ours.settle(completed())
    await ours.close()
    assert len(list(RecordStore(engine).each(Wanted()))) == 1
    with pytest.raises(SettingsError, match="not set"):
        open_ledger(engine, JournalSettings(folder="${NO_SUCH_VARIABLE}/journal"))
    engine.dispose()


async def test_what_is_owed_when_the_ledger_ends_is_written_or_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("app.ledger.ledger.PAY_S", 60)
    full, room = True, vars(Journal)["room"].fget
    monkeypatch.setattr(Journal, "room", property(lambda own: 0 if full else room(own)))
    for name, full in (("early", False), ("late", True)):
        now, full = full, True
        store = MemoryStore()
        async with ledger(tmp_path / name, store) as ours:
            ours.count(shed(name))
            await asyncio.sleep(0.05)
            assert store.records == {}
            full = now
        assert (set(store.records), ours.uncounted) == (set() if now else {name}, int(now))
    assert "without 1 records" in caplog.text
