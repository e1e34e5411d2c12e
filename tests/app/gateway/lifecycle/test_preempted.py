"""How often the engine has suspended a request, through a whole ingress."""

import asyncio

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from tests.support.world import ALIAS, ENGINES, Seen, World

pytestmark = pytest.mark.unit

SETTINGS = ModelSettings.load(
    {"rate_card": {"input": 2, "output": 4}, "queue": {"headroom": 0}}, "user_config"
)
MESSAGES = [{"role": "user", "content": "a b"}]


@pytest.fixture
async def world(tmp_path, monkeypatch):
    for name in ("vllm", "sglang", "tensorrt"):
        dialect = {"dialect": ENGINES[name]["dialect"]} if name != "vllm" else {}
        monkeypatch.setitem(ENGINES, name, {**dialect, "slots": 1, "tokens_per_second": 300})
    made = World(tmp_path, timeout_s=30)
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("route", [Route.CHAT, Route.MESSAGES])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("engine", "expected"), [("vllm", 1), ("sglang", 1), ("tensorrt", None)])
async def test_a_record_says_how_often_its_request_was_suspended(
    world, engine, expected, stream, route
):
    """a94f7f2: no record did; only replicas had a count, of all their requests."""
    if engine == "tensorrt" and route is Route.MESSAGES:
        pytest.skip("it has no such route")
    await world.set(SETTINGS, [engine])

    async def ask(tier, tokens):
        seen = Seen(None, [])
        fields = {"model": ALIAS, "messages": MESSAGES, "max_tokens": tokens, "stream": stream}
        await world.ask(seen, route, {**fields, "service_tier": tier}, "plain")
        assert seen.status == 200 and b"frontline-preemptions" not in seen.body
        assert not [name for name in seen.headers if "preemptions" in name]
        return seen

    async with asyncio.timeout(20):
        victim = asyncio.create_task(ask("default", 200))
        while not world.engines[engine].running:
            await asyncio.sleep(0.001)
        served = [await ask("priority", 3), await victim]
    records = await world.new_records()
    better, worse = (records[one.request_id] for one in served)
    assert (worse["preemptions"], worse["completion_tokens"]) == (expected, 200)
    assert better["preemptions"] == (0 if expected else None)
