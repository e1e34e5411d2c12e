"""What a key may be used for, through a whole ingress."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.tenants.keys import KeyLimits
from app.tenants.scope import KeyScope
from tests.support.waiting import until
from tests.support.world import ALIAS, KEYS, MODEL, World

pytestmark = pytest.mark.unit

CHAT = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
OWN = {
    "here": {"scope": KeyScope(models=frozenset({MODEL}), routes=frozenset({Route.CHAT}))},
    "elsewhere": {"scope": KeyScope(models=frozenset({"nobody/*"}))},
    "embedder": {"scope": KeyScope(routes=frozenset({Route.EMBEDDINGS, Route.TOKENIZE}))},
    "single": {"limits": KeyLimits(in_flight=1)},
    "expired": {"expires": datetime.now(UTC) - timedelta(seconds=1)},
    "expiring": {"expires": datetime(2100, 1, 1, tzinfo=UTC)},
}


@pytest.fixture
async def world(tmp_path, monkeypatch):
    for name, more in OWN.items():
        monkeypatch.setitem(KEYS, name, more)
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    yield made
    await made.close()


@pytest.mark.parametrize("tenant", ["here", "expiring", "plain"])
async def test_a_key_is_served_within_its_scope(world, tenant):
    async with world.client(tenant) as http:
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert [one["id"] for one in (await http.get("/v1/models")).json()["data"]] == [MODEL]
        assert (await http.get(f"/v1/models/{ALIAS}")).status_code == 200


async def test_a_model_outside_its_scope_does_not_exist_for_a_key(world):
    """The answer is that for an unknown model, so that nothing is told of what is there."""
    async with world.client("elsewhere") as http:
        answer = await http.post("/v1/chat/completions", json=CHAT)
        unknown = await http.post("/v1/chat/completions", json=CHAT | {"model": "nothing"})
        assert answer.status_code == unknown.status_code == 404
        assert answer.text == unknown.text.replace("nothing", ALIAS)
        assert (await http.get("/v1/models")).json()["data"] == []
        assert (await http.get(f"/v1/models/{ALIAS}")).status_code == 404


@pytest.mark.parametrize(
    "path", ["chat/completions", "completions", "responses", "messages", "detokenize"]
)
async def test_a_route_outside_its_scope_is_refused(world, path):
    async with world.client("embedder") as http:
        answer = await http.post(f"/v1/{path}", json=CHAT)
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert path in error["message"] and "GET /v1/me" in error["message"]
        if path != "messages":
            assert error["code"] == "route_not_allowed"
        answer = await http.post("/v1/tokenize", json={"model": ALIAS, "prompt": "hello"})
        assert answer.status_code == 200
        assert (await http.get("/v1/me")).json()["routes"] == ["embeddings", "tokenize"]


async def test_a_key_has_a_bound_of_its_own_on_requests_in_flight(world):
    async with world.client("single") as http:
        many = CHAT | {"max_tokens": 1900, "stream": True}
        running = asyncio.create_task(http.post("/v1/chat/completions", json=many))
        await until(lambda: world.taken() == 1)
        answer = await http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 429 and "1" in answer.json()["error"]["message"]
        assert (await http.get("/v1/me")).json()["limits"]["in_flight"] == 1
        running.cancel()
        await asyncio.wait([running])
        await until(lambda: world.taken() == 0)
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_an_expired_key_does_not_work(world):
    async with world.client("expired") as http:
        for path in ("/v1/models", "/v1/me", "/v1/usage"):
            assert (await http.get(path)).json()["error"]["code"] == "invalid_api_key"
        answer = await http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 401
