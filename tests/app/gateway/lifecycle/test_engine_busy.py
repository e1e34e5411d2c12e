"""Engines that have no room themselves, whatever their credits say."""

import asyncio
import json

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from deployments.simulator.settings import InjectedFailures
from tests.support.world import ALIAS, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.close()


def busy(status, kind="error"):
    return InjectedFailures(request=kind, status=status)


async def ask(world, *plan, **more):
    seen = Seen(None, list(plan))
    async with asyncio.timeout(5):
        await world.ask(seen, Route.CHAT, FIELDS | more, "plain")
    return seen, (await world.new_records())[seen.request_id]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_replica_is_asked_first(world, status, stream):
    await world.set(ModelSettings(), ["vllm", "sglang"])
    seen, record = await ask(world, busy(status), stream=stream)
    assert (seen.status, record["state"]) == (200, "completed")
    assert len({attempt.replica_id for attempt in seen.attempts}) == 2


@pytest.mark.parametrize("engines", [["vllm"], ["vllm", "sglang"]])
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("kind", ["error", "error_event"])
async def test_its_status_is_the_answer_where_there_is_no_other(world, status, engines, kind):
    await world.set(ModelSettings(), engines)
    seen, record = await ask(world, busy(status, kind), busy(status, kind), stream=True)
    assert len(seen.attempts) == len(engines)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (status, "engine_overloaded")
    assert seen.headers["retry-after"] == "5" and "x-shed-reason" not in seen.headers
    assert (record["state"], record["reason"]) == ("failed", "engine_overloaded")
    assert float(record["cost"]) == record["completion_tokens"] == 0
    assert world.taken() == 0
