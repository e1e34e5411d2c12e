"""Real vLLM on the CPU, scaled by actual load: 1 -> 2 -> 1."""

import asyncio
from pathlib import Path

import pytest
import yaml

from tests.serving import eventually_async, ingress_app

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parents[2] / "configs" / "autoscaling.yaml"
QUICK = {"scale_down_after_s": 5, "smoothing_s": 10, "default_wait_s": 5, "sleep_after_s": 10}


@pytest.fixture
def scaled(cluster):
    """The model of configs/autoscaling.yaml, with two slots an engine and less patience."""
    apps = yaml.safe_load(CONFIG.read_text())["applications"]
    [app] = (app for app in apps if app["name"] == "smollm2")
    app["name"] = "scaled"
    app["args"] |= {"id": "test/scaled", "aliases": ["scaled"]}
    app["args"]["pools"][0]["slots"] = 2
    model, pool = app["deployments"]
    model["user_config"]["scaling"] = QUICK
    pool["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 2}
    cluster.deploy(ingress_app(), app)
    cluster.wait_ready("scaled", timeout_s=300)
    yield cluster
    cluster.remove("scaled")


async def test_a_real_engine_comes_and_goes_with_the_load(scaled):
    stop, engines = asyncio.Event(), set()

    async def keep_asking(client, tier):
        while not stop.is_set():
            answer = await client.chat.completions.create(
                model="scaled",
                messages=[{"role": "user", "content": "Tell me a story."}],
                service_tier=tier,
                max_tokens=16,
            )
            assert answer.service_tier == tier and answer.usage.completion_tokens
            # The engine that starts needs the machine too.
            await asyncio.sleep(0.5)

    def ready():
        replicas = scaled.snapshot("scaled").replicas
        engines.update(replica.replica_id for replica in replicas)
        return len(replicas)

    async with scaled.async_client() as client, asyncio.TaskGroup() as clients:
        for tier in ("priority", "priority", "default", "default"):
            clients.create_task(keep_asking(client, tier))
        try:
            await eventually_async(lambda: ready() == 2, 240)
        finally:
            stop.set()
    start_s = max(replica.start_s for replica in scaled.snapshot("scaled").replicas)
    assert start_s > 2, "a real engine takes its time"
    # It stays for as long as one takes to start, then it is stopped.
    await eventually_async(lambda: ready() == 1, 60 + 3 * start_s)
    assert len(engines) == 2
