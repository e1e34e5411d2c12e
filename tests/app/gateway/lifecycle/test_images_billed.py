"""Images and cache writes at prices of their own, through a whole ingress."""

import json
from decimal import Decimal

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from tests.support.world import ADAPTER, MODEL, Seen, World

pytestmark = pytest.mark.unit

CARD = {"input": 2, "output": 4, "cached_input": 1, "cache_write": 3, "image": "0.01"}
MODEL_SETTINGS = {
    "rate_card": CARD,
    "adapter_rate_cards": {ADAPTER: {"input": 2, "output": 4, "image": 0}},
    "queue": {"headroom": 0},
}
WORDS = "tell me of the sea, and of the ships on it; " * 4


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path, timeout_s=30)
    await made.start()
    settings = ModelSettings.load(MODEL_SETTINGS, "user_config")
    await made.set(settings, ["vllm"], adapters=(ADAPTER,))
    yield made
    await made.close()


def body(route, size, model=MODEL):
    text = {"type": "text", "text": WORDS}
    data = "A" * size
    if route is Route.MESSAGES:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": data}}  # fmt: skip
    elif route is Route.CHAT:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    else:
        image = {"type": "input_image", "image_url": data}
        text = {"type": "input_text", "text": WORDS}
    asked = [{"role": "user", "content": [text, image, image]}]
    if route is Route.RESPONSES:
        return {"model": model, "input": asked, "max_output_tokens": 4}
    return {"model": model, "messages": asked, "max_tokens": 4}


async def ask(world, route, fields):
    seen = Seen(None, [])
    await world.ask(seen, route, fields, "plain")
    return seen, (await world.new_records())[seen.request_id]


def told(seen, route, stream):
    """The last cost that the client was told."""
    if not stream:
        parts = [json.loads(seen.body, parse_float=Decimal)]
    else:
        lines = [line for line in seen.body.decode().split("\n") if line.startswith("data: {")]
        parts = [json.loads(line.removeprefix("data: "), parse_float=Decimal) for line in lines]
        parts = [part.get("response", part) for part in parts]
    return [usage["estimated_cost"] for part in parts if (usage := part.get("usage"))][-1]


@pytest.mark.parametrize("size", [64, 60_000, 400_000])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [Route.CHAT, Route.RESPONSES, Route.MESSAGES])
async def test_images_are_billed_and_told_besides_their_tokens(world, route, stream, size):
    fields = body(route, size) | {"stream": stream, "service_tier": "flex"}
    seen, record = await ask(world, route, fields)
    assert (seen.status, record["state"]) == (200, "completed"), seen.body
    assert (record["images"], record["usage_estimated"]) == (2, 0)
    tokens = (
        (record["prompt_tokens"] - record["cached_tokens"] - record["cache_write_tokens"]) * 2
        + record["cached_tokens"] * 1
        + record["cache_write_tokens"] * 3
        + record["completion_tokens"] * 4
    )
    cost = (Decimal(tokens) / 10**6 + Decimal("0.02")) * Decimal("0.8")
    assert Decimal(record["cost"]) == cost == told(seen, route, stream)
    assert (record["cache_write_tokens"] > 0) is (route is not Route.RESPONSES)


async def test_every_choice_and_continuous_usage_count_images_once(world):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for more in ({"stream_options": options}, {}):
        fields = body(Route.CHAT, 64) | {"stream": True, "n": 2, "temperature": 1, **more}
        seen, record = await ask(world, Route.CHAT, fields)
        assert record["images"] == 2
        assert Decimal(record["cost"]) == told(seen, Route.CHAT, stream=True)


async def test_an_adapter_whose_images_cost_nothing_bills_none(world):
    _, record = await ask(world, Route.CHAT, body(Route.CHAT, 64, ADAPTER))
    assert (record["images"], Decimal(record["image_price"])) == (0, 0)


async def test_an_engine_that_refuses_bills_no_image(world):
    fields = body(Route.CHAT, 64) | {"max_tokens": -1}
    seen, record = await ask(world, Route.CHAT, fields)
    assert (seen.status, record["state"]) == (400, "failed")
    assert (record["images"], Decimal(record["cost"])) == (0, 0)
