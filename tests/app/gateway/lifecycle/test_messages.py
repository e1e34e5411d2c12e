"""Anthropic's messages through a whole ingress, before engines that have the route and one that has
not."""

import asyncio
import json
from decimal import Decimal
from types import SimpleNamespace

import pytest

from app.config.model import ModelSettings
from app.contracts.status import Sleep
from app.core.dialect import Route
from app.protocol.sse import EventReader, parse_block
from deployments.simulator.settings import InjectedFailures
from tests.support.waiting import until
from tests.support.world import ALIAS, Seen, World

pytestmark = pytest.mark.unit

ASK = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8}
CARD = {"input": 2, "cached_input": 1, "output": 4}
STREAM = [False, True]


@pytest.fixture
async def world(tmp_path, request):
    # How long an engine may be silent, in seconds. Long where none hangs: the machine may be slow.
    hangs = "hang" in getattr(request.node, "callspec", SimpleNamespace(params={})).params.values()
    made = World(tmp_path, timeout_s=1 if hangs else 30)
    await made.start()
    yield made
    await made.close()


async def serve(world, *engines, **more):
    settings = {"rate_card": CARD, "queue": {"headroom": 0}, **more}
    await world.set(ModelSettings.load(settings, "user_config"), engines)


async def ask(world, *plan, route=Route.MESSAGES, tenant="plain", **more):
    seen = Seen(None, list(plan))
    fields = {"model": ALIAS, **ASK, **more}
    await world.ask(seen, route, {k: v for k, v in fields.items() if v is not None}, tenant)
    return seen, (await world.new_records()).get(seen.request_id)


@pytest.fixture
async def filled(world):
    """Both slots are taken until the test has ended."""
    tasks = []

    async def fill():
        await take_slots(world, tasks)

    yield fill
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def take_slots(world, tasks):
    hang = InjectedFailures(request="hang", after_tokens=1)
    fields = {"model": ALIAS, **ASK, "stream": True}
    tasks += [
        asyncio.create_task(world.ask(Seen(None, [hang]), Route.MESSAGES, fields, "plain"))
        for _ in range(2)
    ]
    await until(lambda: world.taken() == 2)


def events_of(seen):
    blocks = EventReader().blocks(seen.body)
    return [json.loads(event.data) for block in blocks if (event := parse_block(block))]


def usage_of(seen):
    if seen.headers["content-type"] == "application/json":
        return json.loads(seen.body)["usage"]
    return next(e["usage"] for e in events_of(seen) if e["type"] == "message_delta")


@pytest.mark.parametrize("stream", STREAM)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("word", "served"),
    [(None, "default"), ("auto", "default"), ("standard_only", "default"), ("priority", "priority"),
     ("flex", "flex"), ("batch", "flex")],
)  # fmt: skip
async def test_the_tier_is_echoed_in_usage_and_billed(world, engine, word, served, stream):
    await serve(world, engine)
    for _ in range(2):
        # The second finds its prompt cached.
        seen, record = await ask(
            world, service_tier=word, stream=stream, system="s " * 40, tenant="plain"
        )
    assert (seen.status, seen.headers["x-service-tier"]) == (200, served)
    assert (record["served_tier"], record["state"]) == (served, "completed")
    assert record["route"] == "messages" and record["usage_estimated"] == 0
    usage = usage_of(seen)
    assert usage["service_tier"] == served
    cached = usage.get("cache_read_input_tokens", 0)
    assert cached == record["cached_tokens"] > 0 or (engine == "sglang" and stream)
    assert record["prompt_tokens"] == 42 and record["completion_tokens"] == 8
    assert usage["output_tokens"] == 8 and usage["input_tokens"] + cached == 42
    assert Decimal(str(usage["estimated_cost"])) == Decimal(record["cost"])
    [attempt] = seen.attempts
    assert {"priority", "service_tier"}.isdisjoint(attempt.fields)
    header = {"vllm": "x-vllm-priority", "sglang": "x-override-priority"}[engine]
    expected = {"priority": "-100", "default": "0", "flex": "100"}[served]
    assert attempt.headers[header] == expected


@pytest.mark.parametrize("stream", STREAM)
async def test_where_priority_is_not_honoured_it_is_default_with_the_reason(world, stream):
    await serve(world, "unordered")
    seen, record = await ask(world, service_tier="priority", stream=stream)
    assert usage_of(seen)["service_tier"] == record["served_tier"] == "default"
    assert seen.headers["x-service-tier-reason"] == "no_replica_honours_priority"
    assert "x-vllm-priority" not in seen.attempts[0].headers


@pytest.mark.parametrize("route", [Route.MESSAGES, Route.COUNT_TOKENS])
async def test_only_engines_that_have_the_route_get_it(world, route):
    await serve(world, "vllm", "tensorrt")
    for _ in range(6):
        seen, _ = await ask(world, route=route)
        assert seen.status == 200 and seen.attempts[0].replica_id.startswith("vllm")
    await serve(world, "tensorrt")
    seen, record = await ask(world, route=route)
    error = json.loads(seen.body)
    assert (seen.status, error["error"]["code"]) == (400, "unsupported_endpoint")
    assert (record["state"], not seen.attempts) == ("refused", True)


async def test_a_request_that_waits_does_not_go_to_an_engine_that_has_come_without_the_route(
    world, filled
):
    await serve(world, "vllm")
    await filled()
    waiting = Seen(None, [])
    task = asyncio.create_task(world.ask(waiting, Route.MESSAGES, {"model": ALIAS, **ASK}, "plain"))
    await asyncio.sleep(0.02)
    await serve(world, "vllm", "tensorrt")
    await asyncio.sleep(0.1)
    assert not waiting.attempts and not task.done()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(
    ("more", "status", "kind"),
    [
        ({"model": "no/such"}, 404, "not_found_error"),
        ({"service_tier": "gold"}, 400, "invalid_request_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"max_tokens": -1}, 400, "invalid_request_error"),
        ({"tenant": "nobody"}, 401, "authentication_error"),
        ({"messages": [{"role": "user", "content": "w " * 9000}]}, 400, "invalid_request_error"),
        ({"plan": InjectedFailures(request="error", status=503)}, 503, "overloaded_error"),
        ({"plan": InjectedFailures(request="error", status=500)}, 500, "api_error"),
        ({"service_tier": "scale", "require_tier": True}, 400, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_errors_are_in_anthropics_shape(world, engine, more, status, kind):
    await serve(world, engine)
    plan = [more["plan"]] * 2 if "plan" in more else []
    seen, record = await ask(world, *plan, **{k: v for k, v in more.items() if k != "plan"})
    error = json.loads(seen.body)
    assert (seen.status, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert isinstance(error["error"]["message"], str)
    assert error["request_id"] == seen.headers["request-id"] != ""
    assert record is None or Decimal(record["cost"]) == 0


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_a_stream_that_is_refused_in_band_costs_nothing(world, engine):
    await serve(world, engine)
    refused = InjectedFailures(request="error_event", status=503)
    seen, record = await ask(world, refused, stream=True)
    assert (record["state"], Decimal(record["cost"])) == ("failed", 0)
    assert json.loads(seen.body)["type"] == "error" and seen.status >= 500


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("failure", ["truncate", "truncate_cleanly", "error_event", "hang"])
async def test_an_interrupted_stream_is_billed_for_what_was_sent(world, engine, failure):
    await serve(world, engine)
    broken = InjectedFailures(request=failure, after_tokens=5)
    seen, record = await ask(world, broken, stream=True, service_tier="priority")
    events = events_of(seen)
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "error"]
    assert events[-1]["error"]["type"] == "api_error"
    # At least one token for each event; more where the words are long.
    assert record["state"] == "interrupted" and 5 <= record["completion_tokens"] <= 8
    assert record["prompt_tokens"] == 2 and record["usage_estimated"] == 1
    assert record["served_tier"] == events[0]["message"]["usage"]["service_tier"] == "priority"
    told = usage_of(seen)
    assert told["service_tier"] == "priority" and told["usage_estimated"] is True
    assert told["output_tokens"] == record["completion_tokens"]
    assert Decimal(str(told["estimated_cost"])) == Decimal(record["cost"])


async def test_a_client_that_leaves_is_billed_for_what_was_sent(world):
    await serve(world, "vllm")
    seen = Seen(None, [InjectedFailures(request="hang", after_tokens=4)])
    fields = {"model": ALIAS, **ASK, "stream": True}
    task = asyncio.create_task(world.ask(seen, Route.MESSAGES, fields, "plain"))
    await until(lambda: seen.body.count(b"text_delta") == 4)
    task.cancel()
    await asyncio.wait([task])
    record = (await world.new_records())[seen.request_id]
    assert record["state"] == "interrupted" and 4 <= record["completion_tokens"] <= 7


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("tier", [None, "priority", "flex"])
async def test_counting_tokens_takes_no_slot_and_costs_nothing(world, filled, engine, tier):
    await serve(world, engine)
    await filled()
    seen, record = await ask(world, route=Route.COUNT_TOKENS, max_tokens=None, service_tier=tier)
    assert (seen.status, json.loads(seen.body)["input_tokens"]) == (200, 2)
    assert world.taken() == 2
    assert (record["state"], Decimal(record["cost"])) == ("completed", 0)
    assert (record["prompt_tokens"], record["queue_s"]) == (0, 0)
    assert record["served_tier"] == ("flex" if tier == "flex" else "default")
    reason = seen.headers.get("x-service-tier-reason")
    assert reason == ("route_does_not_honour_priority" if tier == "priority" else None)


async def test_counting_tokens_goes_to_another_engine_if_one_is_lost(world):
    await serve(world, "vllm", "sglang")
    crash = InjectedFailures(request="error", status=500)
    seen, record = await ask(world, crash, route=Route.COUNT_TOKENS, max_tokens=None)
    assert (seen.status, len(seen.attempts), record["state"]) == (200, 2, "completed")
    seen, record = await ask(world, crash, crash, route=Route.COUNT_TOKENS, max_tokens=None)
    assert (seen.status, len(seen.attempts), record["state"]) == (500, 2, "failed")


async def test_counting_tokens_is_refused_if_every_engine_has_gone_meanwhile(world, monkeypatch):
    await serve(world, "vllm")
    access, charge = world.services.access, world.services.access.charge

    async def charge_slowly(*args):
        await charge(*args)
        await serve(world, "tensorrt")

    monkeypatch.setattr(access, "charge", charge_slowly)
    seen, record = await ask(world, route=Route.COUNT_TOKENS, max_tokens=None)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (503, "engine_not_ready")
    assert (record["state"], seen.attempts) == ("shed", [])


@pytest.mark.parametrize("route", [Route.MESSAGES, Route.COUNT_TOKENS])
async def test_an_engine_that_is_starting_may_have_the_route(world, route):
    card = ModelSettings.load({"rate_card": CARD}, "user_config")
    await world.set(card, ["tensorrt"], pools=("tensorrt", "vllm"))
    seen, _ = await ask(world, route=route)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (503, "engine_not_ready")
    await world.set(card, ["tensorrt"], pools=("tensorrt", "vllm"), missing={"vllm": "1 GPU"})
    seen, _ = await ask(world, route=route)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (400, "unsupported_endpoint")


async def test_counting_tokens_is_no_priority_either_where_it_wakes_the_model(world):
    tiers = {"rate_card": CARD, "tiers": {"priority": "queue"}}
    card = ModelSettings.load(tiers, "user_config")
    await world.set(card, [], sleep=Sleep((), waking=True), pools=("vllm",))
    asked = ask(world, route=Route.COUNT_TOKENS, max_tokens=None, service_tier="priority")
    task = asyncio.create_task(asked)
    await asyncio.sleep(0.05)
    await world.set(card, ["vllm"], sleep=None, pools=("vllm",))
    seen, record = await task
    assert (seen.status, record["served_tier"], record["cost"]) == (200, "default", "0")
    assert seen.headers["x-service-tier-reason"] == "route_does_not_honour_priority"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_the_tokenizer_takes_no_slot_and_costs_nothing(world, filled, engine):
    await serve(world, engine, "tensorrt")
    await filled()
    seen = Seen(None, [])
    fields = {"model": ALIAS, "prompt": "a b a", "service_tier": "flex"}
    await world.ask(seen, Route.TOKENIZE, fields, "plain")
    told = json.loads(seen.body)
    assert (seen.status, told["count"], len(set(told["tokens"]))) == (200, 3, 2)
    assert seen.attempts[0].fields == {"model": "acme/model", "prompt": "a b a"}
    back = Seen(None, [])
    await world.ask(back, Route.DETOKENIZE, {"model": ALIAS, "tokens": told["tokens"]}, "plain")
    assert (back.status, json.loads(back.body)["prompt"]) == (200, "a b a")
    records = await world.new_records()
    for one in (seen, back):
        record = records[one.request_id]
        assert (record["state"], Decimal(record["cost"])) == ("completed", 0)
        assert record["prompt_tokens"] == record["queue_s"] == 0
