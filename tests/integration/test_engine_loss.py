"""Engines that die, hang or are left by their client."""

import asyncio
import time

import openai
import pytest

from tests.support.cluster import (
    actors_titled,
    command_line,
    engine_processes,
    eventually,
    eventually_async,
    simulated_app,
)
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def deployed(frontline):
    """A model whose engine is slow enough to be caught in the act."""
    frontline.deploy(simulated_app("mortal", tokens_per_second=20))
    yield frontline
    frontline.remove("mortal")
    eventually(lambda: not processes_of("mortal"), why="an engine was left behind")


@pytest.fixture
def model(deployed):
    """It with its engine, and with no other afterwards."""
    deployed.wait_ready("mortal")
    eventually(lambda: len(replica_ids(deployed)) == 1)
    yield deployed
    eventually(lambda: one_engine(deployed), why="an engine was left behind")


def processes_of(name):
    return [process for process in engine_processes() if f"test/{name}" in command_line(process)]


def one_engine(frontline):
    """Whether there is one, and all processes of engines are its own."""
    ports = [one.base_url.rpartition(":")[2] for one in frontline.snapshot("mortal").replicas]
    named = [command_line(process) for process in processes_of("mortal")]
    return len(ports) == 1 and all(ports[0] in words for words in named)


def _ids(frontline, app):
    return {replica.replica_id for replica in frontline.snapshot(app).replicas}


def replica_ids(frontline):
    return _ids(frontline, "mortal")


def wait_replaced(frontline, before):
    eventually(lambda: replica_ids(frontline) - before, 40, "the replica was not replaced")
    eventually(lambda: (frontline.entry("mortal") or {}).get("service_tiers"), 10)


def running(frontline):
    with frontline.engine("mortal") as engine:
        return engine.get("/simulate").json()["running"]


def test_a_stream_whose_engine_dies_ends_with_an_error_event(model):
    before = replica_ids(model)
    stream = model.client().chat.completions.create(
        model="mortal", messages=MESSAGES, stream=True, max_tokens=400, service_tier="priority"
    )
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 3:
                for process in processes_of("mortal"):
                    process.kill()
    assert {chunk.service_tier for chunk in chunks} == {"priority"}
    assert "lost before the answer was complete" in caught.value.message
    wait_replaced(model, before)


def test_a_dead_engine_is_replaced_and_serves_again(model):
    before = replica_ids(model)
    old = processes_of("mortal")
    assert old
    for process in old:
        process.kill()
    wait_replaced(model, before)
    answer = model.client().chat.completions.create(model="mortal", messages=MESSAGES, max_tokens=2)
    assert answer.choices[0].message.content
    assert all(not process.is_running() for process in old)


def test_a_hung_engine_is_replaced(model):
    before = replica_ids(model)
    with model.engine("mortal") as engine:
        engine.post("/simulate", json={"failures": {"health_hangs": True, "ignore_sigterm": True}})
    wait_replaced(model, before)


def test_killing_the_replicas_actor_leaves_no_engine_process(model):
    before = replica_ids(model)
    old = processes_of("mortal")
    [actor] = actors_titled("ray::ServeReplica:mortal:simulated")
    actor.kill()
    eventually(lambda: not any(p.is_running() for p in old), 10, "engine processes were left")
    wait_replaced(model, before)


def test_a_request_whose_engine_is_lost_before_the_first_byte_goes_to_another(frontline):
    frontline.deploy(simulated_app("twins", replicas=2))
    try:
        frontline.wait_ready("twins")
        eventually(lambda: len(frontline.snapshot("twins").replicas) == 2, 60)
        failing = frontline.snapshot("twins").replicas[0].replica_id
        with frontline.engine("twins", 0) as engine:
            engine.post("/simulate", json={"failures": {"request": "crash", "at_request": 1}})
        for number in range(40):
            answer = frontline.client().chat.completions.create(
                model="twins",
                messages=[{"role": "user", "content": f"question {number}"}],
                service_tier="priority",
            )
            assert answer.service_tier == "priority"
            if failing not in _ids(frontline, "twins"):
                break
        else:
            pytest.fail("no request met the failing engine")
    finally:
        frontline.remove("twins")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_whose_client_has_gone_is_aborted_in_the_engine(model, stream):
    request = {"model": "mortal", "messages": MESSAGES, "max_tokens": 2000, "stream": stream}
    async with model.async_client() as client:
        task = asyncio.create_task(_ask(client, request))
        await eventually_async(lambda: running(model) == 1)
        task.cancel()
        await asyncio.wait([task])
        start = time.monotonic()
        await eventually_async(lambda: running(model) == 0)
    assert time.monotonic() - start < SLOWEST * 3, "the engine went on for nobody"


async def _ask(client, request):
    answer = await client.chat.completions.create(**request)
    if request["stream"]:
        async for _ in answer:
            pass
