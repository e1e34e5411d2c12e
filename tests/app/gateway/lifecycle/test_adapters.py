"""Requests that name a LoRA adapter, through a whole ingress."""

import json
from decimal import Decimal

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.tenants.scope import KeyScope
from tests.support.world import ALIAS, ENGINES, KEYS, MODEL, Seen, World

pytestmark = pytest.mark.unit

TUNED, PLAIN, NOWHERE = "acme/tuned", "plain", "not-loaded"
SETTINGS = {
    "rate_card": {"input": 2, "output": 4},
    "adapter_rate_cards": {TUNED: {"input": 6, "output": 20}},
    "queue": {"headroom": 0},
}
LOADED = {
    "vllm": {"preemption": False, "adapters": [TUNED, PLAIN]},
    "sglang": {"dialect": "sglang", "preemption": False, "adapters": [TUNED]},
}
ASK = {
    Route.CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    Route.COMPLETIONS: {"prompt": "hello", "max_tokens": 3},
    Route.RESPONSES: {"input": "hello", "max_output_tokens": 3},
    Route.MESSAGES: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    Route.TOKENIZE: {"prompt": "hello"},
}


@pytest.fixture
async def world(tmp_path, monkeypatch):
    for name, settings in LOADED.items():
        monkeypatch.setitem(ENGINES, name, settings)
    scopes = {"tuner": {TUNED}, "baser": {MODEL}}
    for name, models in scopes.items():
        monkeypatch.setitem(KEYS, name, {"scope": KeyScope(models=frozenset(models))})
    made = World(tmp_path, timeout_s=30)
    await made.start()
    yield made
    await made.close()


async def serve(world, *engines):
    settings = ModelSettings.load(SETTINGS, "user_config")
    await world.set(settings, engines, adapters=(TUNED, PLAIN, NOWHERE))


async def ask(world, route, tenant="plain", **fields):
    seen = Seen(None, [])
    await world.ask(seen, route, {"model": ALIAS, **ASK[route], **fields}, tenant)
    return seen, (await world.new_records()).get(seen.request_id)


@pytest.mark.parametrize("route", ASK)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("adapter", "prices"), [(TUNED, (6, 20)), (PLAIN, (2, 4))])
async def test_an_adapter_is_served_and_billed_by_its_name_and_prices(
    world, route, stream, adapter, prices
):
    await serve(world, "vllm", "tensorrt")
    seen, record = await ask(world, route, model=adapter, stream=stream, service_tier="priority")
    assert (seen.status, seen.whole) == (200, True)
    [attempt] = seen.attempts
    assert attempt.replica_id.startswith("vllm"), "the other engine has no adapters"
    assert attempt.fields["model"] == adapter and "lora_path" not in attempt.fields
    assert record["model"] == adapter
    if route is Route.TOKENIZE:
        return
    assert record["served_tier"] == "priority"
    input_price, output_price = prices
    tokens = record["prompt_tokens"] * input_price + record["completion_tokens"] * output_price
    assert Decimal(record["cost"]) == Decimal(tokens) * Decimal("1.5") / 10**6 > 0
    assert f'"model":"{adapter}"'.encode() in seen.body


async def test_sglang_is_told_the_adapter_in_a_field_of_its_own(world):
    await serve(world, "sglang")
    seen, record = await ask(world, Route.CHAT, model=TUNED)
    [attempt] = seen.attempts
    assert (attempt.fields["lora_path"], attempt.fields["model"]) == (TUNED, TUNED)
    assert (seen.status, record["model"]) == (200, TUNED)
    assert json.loads(seen.body)["model"] == TUNED
    # Its other routes would serve the model itself.
    for route in (Route.RESPONSES, Route.MESSAGES):
        seen, record = await ask(world, route, model=TUNED)
        assert (seen.status, seen.attempts, record["cost"]) == (400, [], "0")


@pytest.mark.parametrize("tenant", ["plain", "baser"])
async def test_no_client_names_an_adapter_to_the_engine_itself(world, tenant):
    """A key's scope and the adapter's prices would be passed by."""
    await serve(world, "sglang")
    seen, record = await ask(world, Route.CHAT, tenant, lora_path=TUNED)
    [attempt] = seen.attempts
    assert "lora_path" not in attempt.fields
    assert (seen.status, record["model"]) == (200, MODEL)


async def test_an_adapter_that_no_engine_has_is_refused(world):
    await serve(world, "vllm")
    seen, record = await ask(world, Route.CHAT, model=NOWHERE)
    assert (seen.status, seen.attempts, record["cost"]) == (400, [], "0")


async def test_a_request_waits_for_the_replica_that_has_its_adapter(world):
    await serve(world, "vllm", "sglang")
    for _ in range(6):
        seen, _ = await ask(world, Route.CHAT, model=PLAIN)
        assert seen.status == 200 and seen.attempts[0].replica_id.startswith("vllm")


async def test_a_key_sees_the_adapters_that_its_scope_names(world):
    await serve(world, "vllm")
    listed = {}
    for tenant in ("plain", "tuner", "baser"):
        async with world.client(tenant) as http:
            listed[tenant] = [one["id"] for one in (await http.get("/v1/models")).json()["data"]]
            found = {name: (await http.get(f"/v1/models/{name}")) for name in (MODEL, TUNED)}
            served = {name: one.json()["id"] for name, one in found.items() if one.is_success}
            assert {*served} == {*listed[tenant]} & {MODEL, TUNED}
            assert all(name == id_ for name, id_ in served.items())
    assert listed == {"plain": [MODEL, TUNED, PLAIN, NOWHERE], "tuner": [TUNED], "baser": [MODEL]}
    for tenant, model, status in [("tuner", TUNED, 200), ("tuner", MODEL, 404),
                                  ("baser", TUNED, 404), ("baser", ALIAS, 200)]:  # fmt: skip
        seen, _ = await ask(world, Route.CHAT, tenant, model=model)
        assert seen.status == status, (tenant, model)


async def test_what_adapters_served_counts_as_their_models(world):
    await serve(world, "vllm")
    for model in (TUNED, MODEL):
        await ask(world, Route.CHAT, model=model)
    tallies = world.services.tallies.models
    assert set(tallies) == {MODEL}
    assert sum(tallies[MODEL].outcomes.values()) == 2
