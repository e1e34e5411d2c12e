import asyncio
import threading
import time

import pytest
from sqlalchemy import make_url

from app.config.usage_reads import UsageSettings
from app.core import errors
from app.gateway.usage_reader import UsageReader
from app.ledger.record_store import RecordStore, TooManyRows, Wanted
from app.ledger.usage import Grouping
from app.store.database import StoreTooSlow, connect
from tests.support.records import completed
from tests.support.waiting import until

pytestmark = pytest.mark.unit

ACME, OTHER, THIRD = (Wanted(tenant=name) for name in ("acme", "other", "third"))
GROUPS = [Grouping.TIER]


@pytest.fixture
def url(tmp_path):
    return make_url(f"sqlite:///{tmp_path}/usage.db")


@pytest.fixture
def records(url):
    """The store as the flusher has it."""
    engine = connect(url)
    store = RecordStore(engine)
    store.prepare()
    yield store
    engine.dispose()


class HeldReader(UsageReader):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.let_go, self.threads = threading.Event(), set()


@pytest.fixture
def reader(url, records, monkeypatch):
    """A reader whose readings last until they are let go."""
    reader = HeldReader(url, UsageSettings())
    real = RecordStore.totals

    def slow(*arguments):
        reader.threads.add(threading.current_thread().name)
        reader.let_go.wait(10)
        return real(*arguments)

    monkeypatch.setattr(RecordStore, "totals", slow)
    yield reader
    reader.let_go.set()
    reader.close()


async def test_readings_at_once_are_bounded_by_tenant_and_together(reader):
    first = asyncio.create_task(reader.totals(ACME, GROUPS))
    await asyncio.sleep(0)
    with pytest.raises(errors.UsageBusy) as caught:
        await reader.totals(ACME, GROUPS)
    assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "1")
    second = asyncio.create_task(reader.totals(OTHER, GROUPS))
    await asyncio.sleep(0)
    with pytest.raises(errors.UsageBusy):
        await reader.totals(THIRD, GROUPS)
    reader.let_go.set()
    await asyncio.gather(first, second)
    assert await asyncio.gather(*(reader.totals(one, GROUPS) for one in (ACME, OTHER))) == [[], []]


async def is_busy(reader):
    try:
        await reader.totals(ACME, GROUPS)
    except errors.UsageBusy:
        return True
    return False


async def test_a_reading_counts_until_it_has_ended_though_its_client_has_left(reader):
    left = asyncio.create_task(reader.totals(ACME, GROUPS))
    await until(lambda: reader.threads)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    with pytest.raises(errors.UsageBusy):
        await reader.totals(ACME, GROUPS)
    reader.let_go.set()
    async with asyncio.timeout(10):
        while await is_busy(reader):
            await asyncio.sleep(0.01)


async def test_records_and_keys_do_not_wait_for_readings(reader, records):
    """Neither the event loop's own threads nor the store's connections are taken."""
    readings = [asyncio.create_task(reader.totals(one, GROUPS)) for one in (ACME, OTHER)]
    await until(lambda: len(reader.threads) == 2)
    assert all(name.startswith("usage") for name in reader.threads)
    async with asyncio.timeout(5):
        await asyncio.to_thread(records.add, [completed("one").to_json()])
    reader.let_go.set()
    await asyncio.gather(*readings)


async def test_a_reading_that_fails_makes_room(url, records):
    records.add([completed(f"r{n}").to_json() for n in range(20_000)])
    reader = UsageReader(url, UsageSettings(timeout_s=0.0001))
    try:
        # As many as would take all the room, if they kept it.
        for _ in range(UsageSettings().max_reads + 1):
            began = time.monotonic()
            with pytest.raises(StoreTooSlow):
                await reader.totals(Wanted(), GROUPS)
            assert time.monotonic() - began < 2
    finally:
        await asyncio.to_thread(reader.close)
    reader = UsageReader(url, UsageSettings(max_rows=1))
    try:
        assert len(await reader.totals(Wanted(), GROUPS)) == 1
        records.add([completed("x", tenant="other").to_json()])
        with pytest.raises(TooManyRows):
            await reader.totals(Wanted(), [Grouping.TENANT])
    finally:
        await asyncio.to_thread(reader.close)
