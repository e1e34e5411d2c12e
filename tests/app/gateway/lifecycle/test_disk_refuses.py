"""A stream whose record the disk refuses when its engine has already begun."""

import asyncio
import errno
import json
import os
import threading

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from tests.support.waiting import until
from tests.support.world import MODEL, Seen, World

pytestmark = pytest.mark.unit

STREAM = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 1000,
    "stream": True,
}


class Disk:
    """Syncs as the real one does, or waits until it is told to fail, and fails until mended."""

    def __init__(self, monkeypatch):
        self.broken = False
        self.fail = threading.Event()
        self._real = os.fdatasync
        monkeypatch.setattr("app.ledger.segments.os.fdatasync", self._sync)

    def _sync(self, file):
        if self.broken:
            self.fail.wait(10)
            raise OSError(errno.EIO, "broken")
        self._real(file)


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    try:
        await made.start()
        await made.set(ModelSettings(), ["vllm"])
        yield made
    finally:
        await made.close()


def ask(world, **fields):
    seen = Seen(None, [])
    return seen, asyncio.create_task(world.ask(seen, Route.CHAT, STREAM | fields, "plain"))


async def test_it_is_refused_and_its_engine_stopped_and_nothing_billed(world, monkeypatch):
    disk = Disk(monkeypatch)
    disk.broken = True
    seen, asking = ask(world)
    await until(lambda: world.engines["vllm"].running)
    assert not seen.status, "nothing leaves before the record is durable"
    disk.fail.set()
    await asyncio.wait_for(asking, 5)
    assert (seen.status, seen.whole) == (503, True)
    assert json.loads(seen.body)["error"]["code"] == "ledger_unavailable"
    await until(lambda: not world.engines["vllm"].running)
    assert world.taken() == 0, "its slot is free"
    late, asking = ask(world, stream=False)
    await asyncio.wait_for(asking, 5)
    assert (late.status, late.attempts) == (503, []), "nobody is let in while the disk fails"
    disk.broken = False
    await until(lambda: world.ledger.has_room)
    # Written when there is room again.
    await until(lambda: world.store.added[late.request_id])
    again, asking = ask(world, max_tokens=3)
    await asyncio.wait_for(asking, 5)
    assert (again.status, again.whole) == (200, True)
    assert again.last.endswith(b"data: [DONE]\n\n"), "the end needs no message of its own"
    records = await world.new_records()
    # 568732b: the one that found no room left no record.
    assert set(records) == {seen.request_id, late.request_id, again.request_id}
    late_one = records[late.request_id]
    assert (late_one["state"], late_one["reason"]) == ("refused", "ledger_unavailable")
    refused = records[seen.request_id]
    assert (refused["state"], refused["reason"]) == ("failed", "ledger_unavailable")
    assert float(refused["cost"]) == refused["prompt_tokens"] == refused["completion_tokens"] == 0
    assert records[again.request_id]["state"] == "completed"
    assert world.store.added[seen.request_id] == 1


async def test_a_client_that_leaves_meanwhile_is_on_the_bill_once(world, monkeypatch):
    disk = Disk(monkeypatch)
    disk.broken = True
    seen, asking = ask(world)
    await until(lambda: seen.attempts)
    asking.cancel()
    await until(lambda: not world.engines["vllm"].running)
    disk.broken = False
    disk.fail.set()
    await asyncio.wait([asking])
    assert world.taken() == 0
    records = await world.new_records()
    assert records[seen.request_id]["state"] == "interrupted"
    assert float(records[seen.request_id]["cost"]) == 0
