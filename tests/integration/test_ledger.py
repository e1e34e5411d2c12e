"""Every request that reached an engine is on the bill once, at the tier and cost it was told."""

import asyncio
import time
from decimal import Decimal

import openai
import pytest

from tests.support.cluster import eventually, eventually_async, ingress_processes, simulated_app
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "one two three four five six seven"}]
PRICES = {"input": Decimal(1), "cached_input": Decimal("0.5"), "output": Decimal(2)}
TIMES = {"priority": Decimal("1.5"), "default": Decimal(1), "flex": Decimal("0.8")}


@pytest.fixture(scope="module")
def model(frontline):
    """A model that is slow enough to be left, and that the ledger knows nothing about yet."""
    frontline.deploy(simulated_app("billed", tokens_per_second=100))
    frontline.wait_ready("billed")
    assert billed(frontline, 0) == []
    yield frontline
    frontline.remove("billed")


@pytest.fixture
def bill(model):
    """What has been added to the bill since the test began, once it is so many records."""
    before = {record["request_id"] for record in model.records()}

    def added(count, **wanted):
        def new():
            records = model.records(model="test/billed", **wanted)
            return [r for r in records if r["request_id"] not in before]

        eventually(lambda: len(new()) >= count, 20, f"not {count} records")
        time.sleep(0.5)  # one too many would come now
        records = new()
        assert len(records) == count
        return records

    return added


def billed(frontline, count):
    records = frontline.records(model="test/billed")
    assert len(records) == count
    return records


def ask(frontline, tier="default", **more):
    request = {"max_tokens": 5, "messages": MESSAGES, "service_tier": tier, **more}
    raw = frontline.client().chat.completions.with_raw_response.create(model="billed", **request)
    return raw.headers, raw.parse()


def cost_of(record):
    fresh = record["prompt_tokens"] - record["cached_tokens"]
    at_default = (
        fresh * PRICES["input"]
        + record["cached_tokens"] * PRICES["cached_input"]
        + record["completion_tokens"] * PRICES["output"]
    )
    return at_default * TIMES[record["served_tier"]] / 1_000_000


@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
def test_what_is_billed_is_what_was_echoed(model, bill, tier):
    headers, answer = ask(model, tier)
    [record] = bill(1)
    assert record["state"] == "completed"
    assert record["served_tier"] == headers["x-service-tier"] == answer.service_tier == tier
    assert record["requested_tier"] == tier
    assert record["completion_tokens"] == answer.usage.completion_tokens == 5
    assert record["prompt_tokens"] == answer.usage.prompt_tokens
    assert Decimal(record["cost"]) == cost_of(record)
    assert float(record["cost"]) == pytest.approx(answer.usage.estimated_cost, rel=1e-12)
    assert record["engine"] == headers["x-engine"]
    assert record["request_id"] in answer.id
    assert 0 < record["ttft_s"] <= record["duration_s"] < SLOWEST * 10


def test_a_stream_is_billed_once_by_the_engines_own_count(model, bill):
    chunks = list(
        model.client().chat.completions.create(
            model="billed", messages=MESSAGES, max_tokens=40, stream=True, service_tier="priority"
        )
    )
    [record] = bill(1)
    assert (record["state"], record["stream"]) == ("completed", 1)
    assert record["completion_tokens"] == chunks[-1].usage.completion_tokens == 40
    assert float(record["cost"]) == pytest.approx(chunks[-1].usage.estimated_cost, rel=1e-12)


async def test_a_stream_whose_client_leaves_is_billed_to_there(model, bill):
    async with model.async_client() as client:
        stream = await client.chat.completions.create(
            model="billed", messages=MESSAGES, max_tokens=2000, stream=True
        )
        chunks = 0
        async for _ in stream:
            chunks += 1
            if chunks == 30:
                break
        await stream.close()
    [record] = await asyncio.to_thread(bill, 1)
    assert (record["state"], record["reason"]) == ("interrupted", "client_gone")
    assert 25 <= record["completion_tokens"] < 200
    assert Decimal(record["cost"]) == cost_of(record)


def test_a_stream_whose_engine_fails_is_billed_to_there(model, bill):
    with model.engine("billed") as engine:
        failures = {"request": "truncate", "after_tokens": 20, "at_request": 1}
        engine.post("/simulate", json={"failures": failures})
        with pytest.raises(openai.APIError):
            list(
                model.client().chat.completions.create(
                    model="billed", messages=MESSAGES, max_tokens=50, stream=True
                )
            )
        engine.post("/simulate", json={"failures": {}})
    [record] = bill(1)
    assert (record["state"], record["reason"]) == ("interrupted", "engine_lost")
    assert record["completion_tokens"] == 20


def test_what_an_engine_refuses_costs_nothing(model, bill):
    with pytest.raises(openai.BadRequestError):
        ask(model, max_tokens="many")
    [record] = bill(1)
    assert (record["state"], record["reason"]) == ("failed", "engine_rejected")
    assert (record["prompt_tokens"], Decimal(record["cost"])) == (0, 0)


async def test_who_is_turned_away_is_recorded_as_not_served(model, bill):
    async with model.async_client() as client:

        async def ask_one(tokens, **more):
            return await client.chat.completions.create(
                model="billed", messages=MESSAGES, max_tokens=tokens, **more
            )

        running = [asyncio.create_task(ask_one(200)) for _ in range(8)]
        await asyncio.sleep(0.5)
        with pytest.raises(openai.RateLimitError):
            await ask_one(1, service_tier="flex", extra_body={"fail_fast": True})
        await asyncio.gather(*running)
    [record] = await asyncio.to_thread(bill, 1, state="shed")
    assert (record["reason"], record["served_tier"]) == ("fail_fast", None)
    assert (record["requested_tier"], Decimal(record["cost"])) == ("flex", 0)


async def test_a_stream_that_was_decided_keeps_its_price(model, bill):
    async with model.async_client() as client:
        stream = await client.chat.completions.create(
            model="billed", messages=MESSAGES, max_tokens=300, stream=True
        )
        await anext(stream)
        dear = {"rate_card": {"input": 100, "cached_input": 50, "output": 200}}
        await asyncio.to_thread(reprice, model, dear, 200)
        async for chunk in stream:
            last = chunk
    await asyncio.to_thread(reprice, model, None, 2)
    [record] = await asyncio.to_thread(bill, 1)
    assert Decimal(record["cost"]) == cost_of(record)
    assert last.usage.estimated_cost == pytest.approx(float(record["cost"]), rel=1e-12)


def reprice(frontline, settings, expected):
    frontline.deploy(simulated_app("billed", tokens_per_second=100, settings=settings))
    eventually(lambda: output_price(frontline) == expected, 20)


def output_price(frontline):
    return frontline.entry("billed")["metadata"]["pricing"]["default"]["output_tokens"]


async def test_a_stream_whose_ingress_is_killed_is_billed_to_its_last_step(model, bill):
    async with model.async_client() as client:
        stream = await client.chat.completions.create(
            model="billed", messages=MESSAGES, max_tokens=3000, stream=True, service_tier="priority"
        )
        seen = 0
        with pytest.raises((openai.APIError, Exception)):
            async for chunk in stream:
                seen += bool(chunk.choices and chunk.choices[0].delta.content)
                if seen == 250:
                    kill_ingress()
    await eventually_async(lambda: model.entry("billed"), 60)
    [record] = await asyncio.to_thread(bill, 1)
    assert (record["state"], record["served_tier"]) == ("interrupted", "priority")
    # A step is written every second or 256 tokens; at 100 tokens a second that is a hundred.
    assert seen - 130 <= record["completion_tokens"] <= seen + 130
    assert Decimal(record["cost"]) == cost_of(record)


def test_the_record_is_durable_before_the_last_byte_has_left(model):
    """Killed right after its answers, the ingress owes none of them."""
    answers = [ask(model)[1] for _ in range(10)]
    kill_ingress()
    ids = [answer.id for answer in answers]

    def found():
        records = model.records(model="test/billed", state="completed")
        return [sum(r["request_id"] in one for r in records) for one in ids] == [1] * len(ids)

    eventually(found, 30, "completed answers are not on the bill, once each")


def kill_ingress():
    [ingress] = ingress_processes()
    ingress.kill()
