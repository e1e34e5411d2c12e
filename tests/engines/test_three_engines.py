"""configs/three-engines.yaml as it is: one model on vLLM, SGLang and a simulated engine."""

import asyncio
import os
import time
from collections import Counter

import pytest
import yaml

from tests.engines.pools import CONFIGS
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually,
    eventually_async,
    ingress_app,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
MODEL = "three-engines"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
REAL = {"vllm", "sglang"}
ALL = REAL | {"simulated-tensorrt-llm"}


@pytest.fixture(scope="module")
def three(cluster):
    apps = yaml.safe_load((CONFIGS / "three-engines.yaml").read_text())["applications"]
    [model] = (app for app in apps if app["name"] == "smollm2")
    # Beside other tests' models, one of which has its names.
    model["name"] = MODEL
    model["args"] |= {"id": f"test/{MODEL}", "aliases": [MODEL]}
    cluster.deploy(ingress_app(), model)
    eventually(lambda: engines(cluster) == ALL, 500, "not all of its engines are ready")
    yield cluster
    cluster.remove(MODEL)


def engines(cluster):
    entry = cluster.entry(MODEL)
    return set(entry["metadata"]["engines"]) if entry else set()


async def ask(client, number, tier="default"):
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"{number}: What is the capital of France?"}],
        max_tokens=12,
        temperature=0,
        service_tier=tier,
    )
    answer = raw.parse()
    assert answer.service_tier == raw.headers["x-service-tier"]
    assert answer.usage.estimated_cost > 0
    return raw.headers["x-engine"], answer


async def test_all_engines_serve_default_and_those_that_honour_it_priority(three):
    async with three.async_client() as client:

        async def spread(tier):
            answers = await asyncio.gather(*(ask(client, n, tier) for n in range(12)))
            assert {answer.service_tier for _, answer in answers} == {tier}
            return Counter(engine for engine, _ in answers)

        async def every_engine_serves_default():
            return set(await spread("default")) == ALL

        # Slots are shared out a few seconds after a model's start.
        deadline = time.monotonic() + 30
        while not await every_engine_serves_default():
            assert time.monotonic() < deadline, "an engine gets no requests"
        assert set(await spread("priority")) <= ALL
        assert three.entry(MODEL)["service_tiers"] == ["priority", "default", "flex"]


async def test_a_real_engine_that_dies_is_covered_by_the_others(three):
    """Nobody sees the death of a whole engine; then it is back.

    That is waited for in the long form: test_vllm.py does so for vLLM, and the integration tests
    for one pool of several.
    """
    before = {replica.replica_id for replica in three.snapshot(MODEL).replicas}
    async with three.async_client() as client:
        asking = [asyncio.create_task(ask(client, n, "priority")) for n in range(12)]
        await asyncio.sleep(0.3)
        for process in processes_of("vllm"):
            process.kill()
        answers = await asyncio.gather(*asking)
    assert {answer.service_tier for _, answer in answers} <= {"priority", "default"}
    if LONG:
        await eventually_async(
            lambda: {r.replica_id for r in three.snapshot(MODEL).replicas} - before, 240
        )
        await eventually_async(lambda: engines(three) == ALL, 30)


def processes_of(engine):
    found = []
    for process in engine_processes():
        words = " ".join(command_line(process))
        if f"test/{MODEL}" in words and engine in words and "reaper" not in words:
            found.append(process)
    return found
