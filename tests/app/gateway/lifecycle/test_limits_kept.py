"""What a request that brings no usage counts against its key's limit of tokens."""

import asyncio
import json

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.tenants.keys import KeyLimits
from deployments.simulator.settings import InjectedFailures
from tests.support.world import ALIAS, KEYS, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {
    "model": ALIAS,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 60,
}


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(KEYS, "metered", {"limits": KeyLimits(tpm=120)})
    made = World(tmp_path)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    yield made
    await made.close()


async def asked(world, **more):
    seen = Seen(None, [])
    await world.ask(seen, Route.CHAT, {**FIELDS, **more}, "metered")
    return seen


async def test_who_leaves_before_the_usage_is_known_gets_no_tokens_back(world):
    seen = Seen(None, [InjectedFailures(request="hang")])
    leaving = asyncio.create_task(world.ask(seen, Route.CHAT, FIELDS, "metered"))
    async with asyncio.timeout(5):
        while not seen.attempts:
            await asyncio.sleep(0.002)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    again = await asked(world)
    assert (again.status, json.loads(again.body)["error"]["type"]) == (429, "tokens")


async def test_whom_the_engine_refuses_gets_all_tokens_back(world):
    refused = Seen(None, [InjectedFailures(request="error", status=400)])
    await world.ask(refused, Route.CHAT, FIELDS, "metered")
    assert refused.status == 400
    again = await asked(world)
    assert again.status == 200, again.body
