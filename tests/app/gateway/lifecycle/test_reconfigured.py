"""Requests under way while the ingress's ledger is replaced, as another ``ledger`` setting does."""

import asyncio
from collections import Counter

import orjson
import pytest

from app.config.journal import JournalSettings
from app.config.model import ModelSettings
from app.core.dialect import Route
from app.ledger.ledger import Ledger
from deployments.simulator.settings import InjectedFailures
from tests.support.waiting import until
from tests.support.world import MODEL, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
CHANGES = 3
TENANTS = ("plain", "premium", "frugal", "sharing")
LOST = InjectedFailures(request="truncate")


class Store:
    """Where one ledger's records go; counts how often each has come."""

    def __init__(self):
        self.added = Counter()

    def prepare(self):
        return False

    def add(self, bodies):
        self.added.update(orjson.loads(body)["request_id"] for body in bodies)


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path, timeout_s=5)
    await made.start()
    await made.set(ModelSettings(), ["vllm", "sglang"])
    yield made
    await made.close()


async def test_every_request_is_answered_and_recorded_in_exactly_one_ledger(world, tmp_path):
    """59dfe9e: those that waited in the queue got 503 ``ledger_unavailable``."""
    asked, asking, stores, retired = [], [], [], []
    services = world.services
    for change in range(CHANGES):
        for number, tenant in enumerate(TENANTS * 3):
            # Some lose their engine before the first byte, and wait for another one.
            seen = Seen(None, [LOST] if number % 5 == 4 else [])
            fields = FIELDS | {"stream": number % 2 == 0}
            asked.append(seen)
            asking.append(asyncio.create_task(world.ask(seen, Route.CHAT, fields, tenant)))
        await asyncio.sleep(0.05)
        store, old = Store(), services.ledger
        settings = JournalSettings(segment_mb=1, flush_interval_s=0.01)
        services.ledger = Ledger(tmp_path / f"journal{change}", settings, store)
        stores.append(store.added)
        retired.append(asyncio.create_task(old.retire()))
    # The world closes the one that is in force.
    world.ledger = services.ledger
    async with asyncio.timeout(30):
        await asyncio.gather(*asking, *retired)
    assert Counter(seen.status for seen in asked) == {200: len(asked)}
    expected = Counter(seen.request_id for seen in asked)

    def recorded():
        return sum([*stores, world.store.added], Counter())

    await until(lambda: recorded().total() >= len(asked))
    assert recorded() == expected
    assert sum(map(bool, stores)) > 1, "all changes came too late"
