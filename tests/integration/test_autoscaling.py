"""Serve scales real replicas by the load that comes through the ingress."""

import asyncio
import time
from contextlib import suppress

import httpx
import openai
import pytest

from tests.support.cluster import eventually, eventually_async, pooled_app

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

BOUNDS = {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 0, "downscale_delay_s": 0}
QUICK = {"scale_down_after_s": 3, "smoothing_s": 5, "default_wait_s": 2, "sleep_after_s": 6}


def scaled_app(name, bounds, settings, **pool):
    pools = {"pool": {"autoscaling": BOUNDS | bounds, **pool}}
    app = pooled_app(name, pools, {"scaling": QUICK | settings})
    app["autoscaling_policy"] = {"policy_function": "app.autoscaling:priority_aware"}
    return app


@pytest.fixture
def deploy(frontline):
    names = []

    def deploy(name, *, bounds=(), settings=(), **pool):
        frontline.deploy(scaled_app(name, dict(bounds), dict(settings), **pool))
        names.append(name)
        return frontline

    yield deploy
    for name in names:
        frontline.remove(name)


def ready(frontline, name):
    return len(frontline.snapshot(name).replicas)


async def ask(client, model, tier="default", tokens=20):
    raw = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": "hello"}],
        service_tier=tier,
        max_tokens=tokens,
    )
    return raw.headers, raw.parse()


async def test_replicas_come_and_go_with_the_load(deploy):
    """Five clients at two slots want three replicas; nobody asks for more than that, or fails."""
    frontline = deploy("elastic", bounds={"min_replicas": 1}, slots=2, tokens_per_second=20)
    frontline.wait_ready("elastic")
    stop = asyncio.Event()

    async def keep_asking(client, tier):
        answers = 0
        while not stop.is_set():
            _, answer = await ask(client, "elastic", tier)
            assert answer.service_tier == tier
            answers += 1
        return answers

    async with frontline.async_client() as client, asyncio.TaskGroup() as clients:
        tiers = ["priority", "priority", "priority", "default", "default"]
        asking = [clients.create_task(keep_asking(client, tier)) for tier in tiers]
        try:
            await eventually_async(lambda: ready(frontline, "elastic") == 3, 40)
            decisions = await eventually_async(lambda: frontline.state("elastic")["decisions"])
        finally:
            stop.set()
    assert all(task.result() >= 1 for task in asking)
    # The policy runs in Serve's controller; the board has its decisions and reasons all the same.
    before, after, _ = decisions[0]["pools"]["pool"]
    assert before == 1 < after and "needs" in decisions[0]["why"]
    await eventually_async(lambda: ready(frontline, "elastic") == 1, 40)


async def test_a_model_sleeps_and_the_first_request_wakes_it(deploy):
    frontline = deploy("dormant", bounds={"max_replicas": 1}, slots=2, startup_seconds=3)
    asleep = await eventually_async(lambda: frontline.entry("dormant"), 60)
    await eventually_async(lambda: (frontline.entry("dormant") or {}).get("service_tiers"))
    assert asleep["id"] == "test/dormant"
    async with frontline.async_client() as client:
        # 0 -> 1: nobody is refused but who will not wait.
        start = time.monotonic()
        first, second = await asyncio.gather(
            ask(client, "dormant", "priority"), ask(client, "dormant")
        )
        assert time.monotonic() - start > 3
        for (headers, answer), tier in ((first, "priority"), (second, "default")):
            assert answer.service_tier == headers["x-service-tier"] == tier
            assert float(headers["x-queue-time-ms"]) > 2000
        assert ready(frontline, "dormant") == 1
        # 1 -> 0: it is listed all the same.
        await eventually_async(lambda: ready(frontline, "dormant") == 0, 80)
        resting = lambda: frontline.snapshot("dormant").sleep  # noqa: E731
        rest = await eventually_async(resting)
        assert rest.start_s >= 3
        # The ingress knows it a moment later.
        await eventually_async(lambda: not frontline.entry("dormant")["metadata"]["engines"])
        assert frontline.entry("dormant")["service_tiers"] == ["priority", "default", "flex"]
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(
                model="dormant",
                messages=[{"role": "user", "content": "hello"}],
                extra_body={"fail_fast": True},
            )
        wait_s = float(caught.value.response.headers["retry-after-ms"]) / 1000
        assert wait_s == pytest.approx(rest.start_s, abs=0.5)
        # And again: it is not the first time that wakes it alone.
        headers, _ = await ask(client, "dormant", "flex")
        assert float(headers["x-queue-time-ms"]) > 2000


def test_engines_that_fail_are_no_sleep(deploy):
    frontline = deploy("broken", bounds={"min_replicas": 1}, startup_seconds=4)
    frontline.wait_ready("broken")
    with frontline.engine("broken") as engine, suppress(httpx.TransportError):
        engine.post("/simulate", json={"failures": {"request": "crash", "at_request": 1}})
        engine.post("/v1/chat/completions", json={"model": "test/broken", "messages": []})
    eventually(lambda: not ready(frontline, "broken"))
    assert frontline.snapshot("broken").sleep is None
    eventually(lambda: not frontline.entry("broken")["service_tiers"])
    body = {"model": "broken", "messages": [{"role": "user", "content": "hello"}]}
    with frontline.http() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_not_ready")
    assert frontline.snapshot("broken").sleep is None
