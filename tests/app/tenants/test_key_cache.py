import asyncio
import time

import pytest

from app.store.database import StoreAway
from app.tenants import key_cache
from app.tenants.key_cache import KeyCache
from app.tenants.keys import KeyTable, create_key
from tests.support.records import NOON
from tests.support.waiting import until

pytestmark = pytest.mark.unit


class MemoryKeys:
    def __init__(self):
        self.keys, self.error, self.reads, self.delay_s = [], None, 0, 0.0
        self.unreadable = {}

    def table(self):
        self.reads += 1
        keys = list(self.keys)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return KeyTable.of(keys, self.unreadable)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(key_cache, "REFRESH_S", 0.05)
    monkeypatch.setattr(key_cache, "SOONEST_S", 0.02)
    return MemoryKeys()


@pytest.fixture
async def ring(store):
    ring = KeyCache(store)
    ring.start()
    yield ring
    await ring.stop()


def new_key(store):
    key, text = create_key("acme", created=NOON)
    store.keys.append(key)
    return key, text


async def test_a_new_key_works_at_once(ring, store):
    for _ in range(5):
        key, text = new_key(store)
        assert await ring.find(text) is key


async def test_a_key_made_while_keys_are_read_works_at_once(store):
    store.delay_s = 0.1
    ring = KeyCache(store)
    ring.start()
    await asyncio.sleep(0.05)
    key, text = new_key(store)
    assert await ring.find(text) is key
    await ring.stop()


async def test_a_revoked_key_stops_working_soon(ring, store):
    _, text = new_key(store)
    assert await ring.find(text)
    store.keys.clear()
    deadline = time.monotonic() + 2
    while await ring.find(text):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("error", [StoreAway("away"), ArithmeticError("our fault")])
async def test_known_keys_go_on_working_while_the_store_is_away(ring, store, error, caplog):
    key, text = new_key(store)
    assert await ring.find(text) is key
    store.error = error
    _, unknown = new_key(store)
    await asyncio.sleep(0.2)
    assert await ring.find(text) is key
    assert await ring.find(unknown) is None
    assert ring.read and ring.away
    if isinstance(error, StoreAway):
        assert caplog.text.count("cannot be read") == 1
    else:
        assert "key reading failed" in caplog.text
    store.error = None
    assert await ring.find(unknown)
    assert not ring.away


async def test_a_flood_of_unknown_keys_reads_seldom(ring, store):
    unknown = [create_key("x", created=NOON)[1] for _ in range(300)]
    before, begin = store.reads, time.monotonic()
    assert not any(await asyncio.gather(*(ring.find(text) for text in unknown)))
    elapsed = time.monotonic() - begin
    assert store.reads - before <= elapsed / 0.02 + 2


async def test_what_is_no_key_asks_nobody(store):
    ring = KeyCache(store)
    for text in ("none", "", "fl-x", "sk-abc"):
        assert await ring.find(text) is None
    assert store.reads == 0


async def test_one_that_gives_up_does_not_spoil_it_for_the_others(store):
    store.delay_s = 0.1
    ring = KeyCache(store)
    key, text = new_key(store)
    impatient, patient = asyncio.create_task(ring.find(text)), asyncio.create_task(ring.find(text))
    await asyncio.sleep(0.03)
    impatient.cancel()
    assert await patient is key
    await ring.stop()


async def test_unreadable_rows_are_counted_and_named_in_the_log_once(ring, store, caplog):
    store.unreadable = {"0123": "ValueError: rpm is at least 1"}
    _, text = new_key(store)
    assert await ring.find(text)
    assert ring.unreadable == 1
    await asyncio.sleep(0.2)
    assert caplog.text.count("key 0123 cannot be read") == 1
    store.unreadable = {}
    _, text = new_key(store)
    assert await ring.find(text)
    assert ring.unreadable == 0


async def test_who_waits_for_a_key_waits_for_the_store_that_has_taken_the_others_place(store):
    """59dfe9e: waiting was cancelled, and with it the request."""
    store.delay_s = 0.2
    ring = KeyCache(store)
    ring.start()
    other = MemoryKeys()
    key, text = new_key(other)
    finding = asyncio.create_task(ring.find(text))
    await asyncio.sleep(0.05)
    ring.read_from(other)
    assert await asyncio.wait_for(finding, 5) is key
    await ring.stop()


async def test_known_keys_work_until_the_other_store_has_been_read(ring, store):
    key, text = new_key(store)
    assert await ring.find(text) is key
    other = MemoryKeys()
    other.error = StoreAway("away")
    ring.read_from(other)
    await until(lambda: ring.away)
    assert await ring.find(text) is key
    other.error = None
    await until(lambda: ring.known(text) is None)
