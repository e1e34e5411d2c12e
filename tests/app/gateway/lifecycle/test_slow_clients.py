"""Clients that do not read: they hold no slot that the engine has left, and no engine for long."""

import asyncio

import pytest

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.core.dialect import Route
from app.upstream.http1 import EngineConnection
from tests.support.waiting import until
from tests.support.world import ALIAS, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    made.services.settings = IngressSettings(auth="keys", slow_reader_s=0.1)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    yield made
    await made.close()


def asking(world, **more):
    seen = Seen(None, [], reads=asyncio.Event())
    return seen, asyncio.create_task(world.ask(seen, Route.CHAT, FIELDS | more, "plain"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_slot_is_free_once_the_engine_has_ended(world, stream):
    seen, task = asking(world, stream=stream, max_tokens=40)
    await until(lambda: seen.status and not world.taken())
    assert not seen.body and not task.done(), "the client has read nothing yet"
    await asyncio.sleep(0.3)
    seen.reads.set()
    await asyncio.wait_for(task, 5)
    assert (seen.status, seen.whole) == (200, True)
    record = (await world.new_records())[seen.request_id]
    assert (record["state"], record["completion_tokens"]) == ("completed", 40)
    assert EngineConnection.held.size == 0


@pytest.mark.parametrize("bound", ["MOST_UNREAD", "of all together"])
async def test_the_engine_is_stopped_once_the_buffer_is_full(world, monkeypatch, bound):
    monkeypatch.setattr("app.upstream.http1.LEAST_UNREAD", 4096)
    if bound == "MOST_UNREAD":
        monkeypatch.setattr("app.upstream.http1.MOST_UNREAD", 4096)
    else:
        monkeypatch.setattr("app.upstream.http1.MOST_HELD", 0)
    seen, task = asking(world, stream=True, max_tokens=1900)
    await asyncio.wait_for(task, 5)
    assert not seen.whole
    await until(lambda: not world.engines["vllm"].running)
    assert world.taken() == 0
    record = (await world.new_records())[seen.request_id]
    assert (record["state"], record["reason"]) == ("interrupted", "client_slow")
    assert EngineConnection.held.size == 0


async def test_a_client_that_reads_again_in_time_gets_all(world, monkeypatch):
    monkeypatch.setattr("app.upstream.http1.LEAST_UNREAD", 2048)
    monkeypatch.setattr("app.upstream.http1.MOST_UNREAD", 4096)
    world.services.settings = IngressSettings(auth="keys", slow_reader_s=5)
    seen, task = asking(world, stream=True, max_tokens=200)
    await asyncio.sleep(0.2)
    seen.reads.set()
    await asyncio.wait_for(task, 10)
    assert seen.whole and seen.body.endswith(b"data: [DONE]\n\n")
    assert (await world.new_records())[seen.request_id]["completion_tokens"] == 200
