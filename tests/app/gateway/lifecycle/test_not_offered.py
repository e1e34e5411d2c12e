"""Requests that wait for a model which, meanwhile, no node can run any more."""

import asyncio
import json

import pytest

from app.config.model import ModelSettings
from app.contracts.start import StartFailure, StartProblem
from app.contracts.status import Sleep
from app.core.dialect import Route
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier
from tests.support.world import ALIAS, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}]}
WAKING = {"sleep": Sleep((), waking=True), "pools": ("vllm",)}
NOWHERE = {**WAKING, "missing": {"vllm": "GPU: 8"}}


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr("app.flow.scheduler.GIVE_UP_S", 0.05)
    made = World(tmp_path)
    await made.start()
    yield made
    await made.close()


async def test_who_waits_is_answered_as_who_comes_is(world):
    await world.set(ModelSettings(), [], **WAKING)
    waits, comes = Seen(None, []), Seen(None, [])
    waiting = asyncio.create_task(world.ask(waits, Route.CHAT, FIELDS, "plain"))
    await asyncio.sleep(0.1)
    assert not waits.status
    await world.set(ModelSettings(), [], **NOWHERE)
    await world.ask(comes, Route.CHAT, FIELDS, "plain")
    assert not waits.status, "it may be but for a moment"
    async with asyncio.timeout(5):
        await waiting
    for seen in (waits, comes):
        error = json.loads(seen.body)["error"]
        assert (seen.status, error["code"]) == (503, "engine_not_offered")
        assert seen.headers["retry-after"] == "60" and "GPU" not in error["message"]
    assert float(waits.headers["x-queue-time-ms"]) > 100
    assert waits.headers["x-shed-reason"] == "engine_not_offered"
    records = await world.new_records()
    assert records[waits.request_id]["state"] == "shed"
    assert records[comes.request_id]["state"] == "refused"
    assert {record["reason"] for record in records.values()} == {"engine_not_offered"}


async def test_it_is_served_where_a_node_comes_in_time(world):
    await world.set(ModelSettings(), [], **WAKING)
    seen = Seen(None, [])
    waiting = asyncio.create_task(world.ask(seen, Route.CHAT, FIELDS, "plain"))
    await asyncio.sleep(0.05)
    await world.set(ModelSettings(), [], **NOWHERE)
    await world.set(ModelSettings(), [], **WAKING, missing={})
    await asyncio.sleep(0.1)
    await world.set(ModelSettings(), ["vllm"], sleep=None)
    async with asyncio.timeout(5):
        await waiting
    assert seen.status == 200


async def test_who_waits_for_an_engine_that_fails_to_start_is_told_why(world):
    """d26830b: who came was told to try again in a few seconds; who waited, that it was busy."""
    failure = StartFailure("vllm", StartProblem.NO_GPU, "/secret/path", "look", "/logs/x", "n")
    await world.set(ModelSettings(), [], **WAKING)
    waits, comes = Seen(None, []), Seen(None, [])
    waiting = asyncio.create_task(world.ask(waits, Route.CHAT, FIELDS, "plain"))
    await asyncio.sleep(0.1)
    await world.set(ModelSettings(), [], sleep=None, pools=("vllm",), failed={"vllm": failure})
    await world.ask(comes, Route.CHAT, FIELDS, "plain")
    async with asyncio.timeout(5):
        await waiting
    for seen in (waits, comes):
        error = json.loads(seen.body)["error"]
        assert (seen.status, error["code"]) == (503, "engine_failed")
        assert "failed to start: it finds no GPU" in error["message"]
        assert seen.headers["retry-after"] == "60" and "/" not in error["message"]
    records = await world.new_records()
    assert {record["reason"] for record in records.values()} == {"engine_failed"}
    # 705d2f5: `engine_not_offered` in metrics and in `frontline top`.
    assert waits.headers["x-shed-reason"] == "engine_failed"
    sheds = world.registry.find(ALIAS).state().sheds
    assert sheds == {(Tier.DEFAULT, ShedReason.ENGINE_FAILED): 1}
