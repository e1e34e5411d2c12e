"""Requests that insist on their tier are refused instead of being served at another one."""

import json

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from tests.support.engine_scripts import CRASH
from tests.support.world import ALIAS, Seen, World

pytestmark = pytest.mark.unit

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
STRICT = {"strict": True}


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.close()


async def ask(world, *plan, tiers=(), engines=("vllm",), tenant="plain", route=Route.CHAT, **more):
    await world.set(ModelSettings.load({"tiers": dict(tiers)}, "user_config"), engines)
    seen = Seen(None, list(plan))
    prompt = {"input": "hello"} if route is Route.RESPONSES else CHAT
    await world.ask(seen, route, {"model": ALIAS, **prompt, **more}, tenant)
    return seen, (await world.new_records())[seen.request_id]


REQUIRED = {"require_tier": True}
CASES = [
    (400, "no_such_tier", {"service_tier": "scale"}),
    (400, "model_does_not_offer_tier", {"service_tier": "flex", "tiers": {"flex": False}}),
    (403, "key_may_not_use_tier", {"service_tier": "priority", "tenant": "frugal"}),
    (429, "no_replica_honours_priority", {"service_tier": "fast", "engines": ["unordered"]}),
    (
        400,
        "route_does_not_honour_priority",
        {"service_tier": "priority", "engines": ["sglang"], "route": Route.RESPONSES},
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "reason", "request_"), CASES)
async def test_it_is_served_as_default_unless_the_request_or_the_model_insists(
    world, status, reason, request_, stream
):
    seen, record = await ask(world, **request_, stream=stream)
    assert (seen.status, seen.headers["x-service-tier-reason"]) == (200, reason)
    assert (record["served_tier"], record["reason"]) == ("default", reason)
    strict = {"tiers": STRICT | request_.get("tiers", {})}
    for insisting in (request_ | REQUIRED, request_ | strict):
        seen, record = await ask(world, **insisting, stream=stream)
        error = json.loads(seen.body)["error"]
        assert (seen.status, error["code"]) == (status, "service_tier_unavailable")
        assert error["param"] == "service_tier"
        assert seen.headers["x-service-tier-reason"] == reason
        assert ("retry-after" in seen.headers) is (status == 429)
        assert not seen.attempts and world.taken() == 0
        assert (record["state"], record["reason"]) == ("refused", "service_tier_unavailable")
        assert (record["served_tier"], float(record["cost"])) == (None, 0)


@pytest.mark.parametrize("tier", [None, "auto"])
async def test_strict_is_about_tiers_that_are_named(world, tier):
    seen, _ = await ask(
        world, tiers=STRICT, engines=["unordered"], tenant="premium", service_tier=tier
    )
    assert (seen.status, seen.headers["x-service-tier"]) == (200, "default")
    seen, _ = await ask(
        world, engines=["unordered"], tenant="premium", service_tier=tier, require_tier=True
    )
    assert seen.status == 429


async def test_a_required_tier_that_is_served_never_reaches_the_engine_as_a_field(world):
    seen, record = await ask(world, service_tier="priority", require_tier=True)
    assert (seen.status, record["served_tier"]) == (200, "priority")
    assert {"require_tier", "service_tier"}.isdisjoint(seen.attempts[0].fields)


async def test_after_a_crash_it_is_not_served_where_its_tier_is_not_honoured(world):
    for required, status in ((False, 200), (True, 429)):
        if not world.engines["vllm"].up:
            await world.restart("vllm")
        seen, record = await ask(
            world, CRASH, engines=["vllm", "unordered"], service_tier="priority",
            require_tier=required,
        )  # fmt: skip
        assert (seen.status, len(seen.attempts)) == (status, 1 if required else 2)
        assert (float(record["cost"]), record["completion_tokens"]) == (0, 2 if not required else 0)
    assert (record["state"], record["reason"]) == ("failed", "service_tier_unavailable")
