"""What a caller is told of itself, through a whole ingress."""

import asyncio

import pytest

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.core.tiers import Tier
from tests.app.gateway.test_cross_site import http
from tests.support.waiting import until
from tests.support.world import ALIAS, World

pytestmark = pytest.mark.unit

CHAT = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("tenant", "default", "tiers", "limits"),
    [
        ("plain", "default", list(Tier), {}),
        ("premium", "priority", list(Tier), {}),
        ("frugal", "flex", ["default", "flex"], {}),
        ("sharing", "default", list(Tier), {"priority_share": 0.5}),
        ("limited", "default", list(Tier), {"requests_per_minute": 60}),
    ],
)
async def test_a_key_is_told_its_rights_and_limits(world, tenant, default, tiers, limits):
    async with world.client(tenant) as http:
        told = (await http.get("/v1/me")).json()
    assert (told["tenant"], told["default_tier"]) == (tenant, default)
    assert told["service_tiers"] == tiers
    assert told["key"].keys() == {"id", "name", "created", "expires"}
    assert world.key(tenant) not in str(told)
    none = dict.fromkeys(["requests_per_minute", "tokens_per_minute", "priority_share"])
    bounds = {"in_flight": 2000, "in_flight_of_tenant": 8000}
    assert told["limits"] == none | bounds | limits


async def test_it_is_told_what_is_left_and_asking_takes_nothing_of_it(world):
    async with world.client("limited") as http:
        for _ in range(3):
            answer = await http.post("/v1/chat/completions", json=CHAT)
        left = int(answer.headers["x-ratelimit-remaining-requests"])
        for _ in range(3):
            told = (await http.get("/v1/me")).json()
        assert left <= told["remaining"]["requests"] <= left + 1
        assert told["remaining"]["tokens"] is None


async def test_it_is_told_how_many_requests_it_has_in_flight(world):
    async with world.client("plain") as http:
        many = CHAT | {"max_tokens": 1900, "stream": True}
        task = asyncio.create_task(http.post("/v1/chat/completions", json=many))
        await until(lambda: world.taken() == 1)
        assert (await http.get("/v1/me")).json()["in_flight"] == {"key": 1, "tenant": 1}
        task.cancel()
        await asyncio.wait([task])


async def test_without_keys_everybody_may_have_all_tiers():
    open_to_all, services = http()
    services.settings = IngressSettings(default_tier=Tier.FLEX)
    async with open_to_all:
        told = (await open_to_all.get("/v1/me")).json()
    assert (told["key"], told["tenant"], told["default_tier"]) == (None, "", "flex")
    assert told["service_tiers"] == list(Tier) and told["in_flight"] is None
    assert set(told["limits"].values()) | set(told["remaining"].values()) == {None}


async def test_a_wrong_key_is_told_nothing(world):
    async with world.client("plain") as http:
        assert (await http.get("/v1/me", headers={"x-api-key": "no"})).status_code == 401
