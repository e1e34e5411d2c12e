"""Requests that name a LoRA adapter, through a whole ingress."""

import asyncio
import json
from decimal import Decimal

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.tenants.scope import KeyScope
from deployments.simulator.settings import InjectedFailures
from tests.support.waiting import until
from tests.support.world import ALIAS, ENGINES, KEYS, MODEL, SLOTS, Seen, World

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


async def later(world, engine, *names):
    """Adapters that running engines are to load, of which only ``engine`` has some."""
    adapters = [{"name": name, "path": f"/{name}"} for name in names]
    settings = ModelSettings.load({**SETTINGS, "adapters": adapters}, "user_config")
    await world.set(settings, [engine], adapters=names)


@pytest.mark.parametrize("route", ASK)
async def test_an_adapter_that_is_being_loaded_is_asked_for_again_in_a_moment(world, route):
    await later(world, "vllm", TUNED, NOWHERE)
    seen, record = await ask(world, route, model=NOWHERE)
    assert (seen.status, seen.attempts, record["cost"]) == (503, [], "0")
    assert float(seen.headers["retry-after"]) > 0 and b"engine_not_ready" in seen.body
    # The others are served meanwhile.
    for model in (TUNED, ALIAS):
        assert (await ask(world, route, model=model))[0].status == 200
    # On a route that adapters do not have at all, waiting would not help.
    if route in (Route.RESPONSES, Route.MESSAGES):
        await later(world, "sglang", TUNED)
        assert (await ask(world, route, model=TUNED))[0].status == 400


@pytest.mark.parametrize("route", ASK)
async def test_a_removed_adapter_is_as_unknown_as_any_other_name(world, route):
    await later(world, "vllm", TUNED)
    assert (await ask(world, route, model=TUNED))[0].status == 200
    await later(world, "vllm")
    answers = [await ask(world, route, model=name) for name in (TUNED, "never-there")]
    assert [seen.status for seen, _ in answers] == [404, 404]
    removed, unknown = (json.loads(seen.body)["error"] for seen, _ in answers)
    assert removed["message"].replace(TUNED, "never-there") == unknown["message"]
    assert {**removed, "message": ""} == {**unknown, "message": ""}


async def test_a_request_whose_adapter_is_removed_while_it_waits_is_not_served(world):
    """It would be billed by the model's prices: those of the adapter are gone."""
    await later(world, "vllm", TUNED)
    # They keep their slots, however slow the machine is.
    held = [Seen(None, [InjectedFailures(request="hang")]) for _ in range(SLOTS)]
    asked = {"model": ALIAS, **ASK[Route.CHAT], "stream": True}
    running = [asyncio.create_task(world.ask(one, Route.CHAT, asked, "plain")) for one in held]
    await until(lambda: world.taken() == SLOTS)
    waiting = asyncio.create_task(ask(world, Route.CHAT, model=TUNED, service_tier="flex"))
    admission = world.registry.find(MODEL)
    await until(lambda: sum(admission.state().waiting.values()))
    await later(world, "vllm")
    for one in running:
        one.cancel()
    seen, record = await waiting
    assert (seen.status, seen.attempts) == (404, []) and b"model_not_found" in seen.body
    assert (record["state"], record["cost"]) == ("refused", "0")
    await asyncio.gather(*running, return_exceptions=True)


async def test_running_requests_of_a_removed_adapter_end_normally_at_its_prices(world):
    await later(world, "vllm", TUNED)
    seen = Seen(None, [])
    fields = {"model": TUNED, **ASK[Route.CHAT], "max_tokens": 400, "stream": True}
    running = asyncio.create_task(world.ask(seen, Route.CHAT, fields, "plain"))
    await until(lambda: seen.body)
    await later(world, "vllm")
    await running
    assert (seen.status, seen.whole) == (200, True)
    record = (await world.new_records())[seen.request_id]
    tokens = record["prompt_tokens"] * 6 + record["completion_tokens"] * 20
    assert Decimal(record["cost"]) == Decimal(tokens) / 10**6


@pytest.mark.parametrize("path", ["load_lora_adapter", "unload_lora_adapter"])
async def test_no_client_reaches_the_engines_routes_that_change_adapters(world, path):
    await serve(world, "vllm")
    async with world.client("plain") as http:
        for prefix in ("/v1/", "/", "/v1/openai/", "/anthropic/v1/"):
            body = {"lora_name": "mine", "lora_path": "/x"}
            assert (await http.post(f"{prefix}{path}", json=body)).status_code == 404


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
