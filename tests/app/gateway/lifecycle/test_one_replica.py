"""A model with one replica: who loses it before the first byte does not wait for another."""

import asyncio
import json

import pytest

from app.config.model import ModelSettings
from app.contracts.status import Sleep
from app.core.dialect import Route
from deployments.simulator.settings import InjectedFailures
from tests.support.waiting import until
from tests.support.world import ALIAS, HANG_UP, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
HANG, CRASH = InjectedFailures(request="hang"), InjectedFailures(request="crash")
ROUTES = [Route.CHAT, Route.COMPLETIONS, Route.RESPONSES]
FAR_BELOW_MAX_WAIT_S = 5
MODEL = ModelSettings.load({"queue": {"headroom": 0}}, "user_config")


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    await made.set(MODEL, ["vllm"])
    yield made
    await made.close()


def asking(world, *plan, **more):
    seen = Seen(None, list(plan))
    return seen, asyncio.create_task(world.ask(seen, Route.CHAT, FIELDS | more, "plain"))


async def ask(world, *plan, **more):
    seen, task = asking(world, *plan, **more)
    await asyncio.wait_for(task, FAR_BELOW_MAX_WAIT_S)
    return seen


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kept_connection_that_the_engine_closes_is_nobodys_loss(world, stream):
    assert (await ask(world)).status == 200
    seen = await ask(world, HANG_UP, stream=stream)
    assert (seen.status, seen.whole, len(seen.attempts)) == (200, True, 2)
    # Nobody is suspended, so the next one does not wait.
    assert float((await ask(world)).headers["x-queue-time-ms"]) < 500
    record = (await world.new_records())[seen.request_id]
    assert (record["state"], record["completion_tokens"]) == ("completed", 4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("failure", [HANG, CRASH, HANG_UP], ids=["hang", "crash", "hang up"])
async def test_who_loses_the_only_replica_is_told_at_once(world, failure, kept, stream):
    if kept:
        await ask(world)
    seen = await ask(world, failure, failure, stream=stream)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (503, "engine_not_ready")
    assert seen.headers["x-shed-reason"] == "no_other_replica"
    assert seen.headers["retry-after"] == "5"
    assert len(seen.attempts) == (2 if kept and failure is HANG_UP else 1), "time-outs are final"
    assert world.taken() == 0
    record = (await world.new_records())[seen.request_id]
    assert (record["state"], record["reason"]) == ("failed", "no_other_replica")
    assert float(record["cost"]) == 0


async def test_one_that_answers_others_but_is_slow_with_one_is_not_left_alone(world):
    slow, task = asking(world, HANG, stream=True)
    await until(lambda: slow.attempts)
    while not task.done():
        other = await ask(world, stream=True)
        assert (other.status, float(other.headers["x-queue-time-ms"]) < 500) == (200, True)
    await task
    assert slow.status == 503
    assert float((await ask(world)).headers["x-queue-time-ms"]) < 500


async def test_who_waits_for_another_is_told_when_there_will_be_none(world, monkeypatch):
    monkeypatch.setattr("app.flow.scheduler.SUSPENSION_S", 0.05)
    await world.set(MODEL, ["vllm", "sglang"])
    crowd = [asking(world, HANG) for _ in range(4)]
    await until(lambda: all(seen.attempts for seen, _ in crowd))
    # All slots of both are taken: whoever is lost waits for the other replica.
    await world.set(MODEL, ["vllm"])
    async with asyncio.timeout(FAR_BELOW_MAX_WAIT_S):
        await asyncio.gather(*(task for _, task in crowd))
    assert {seen.status for seen, _ in crowd} <= {200, 503}
    assert 503 in {seen.status for seen, _ in crowd}
    assert world.taken() == 0


async def test_who_loses_the_last_replica_of_a_model_that_wakes_waits_for_it(world):
    seen, task = asking(world, HANG)
    await until(lambda: seen.attempts)
    await world.set(MODEL, [], sleep=Sleep((), waking=True), pools=("vllm",))
    await asyncio.sleep(0.4)
    assert not seen.status
    await world.set(MODEL, ["sglang"], sleep=None)
    await asyncio.wait_for(task, FAR_BELOW_MAX_WAIT_S)
    assert (seen.status, len(seen.attempts)) == (200, 2)
