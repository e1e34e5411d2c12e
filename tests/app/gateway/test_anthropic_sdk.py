"""The official ``anthropic`` SDK, unmodified, over HTTP: an ingress before simulated engines."""

import asyncio
import contextlib
from types import SimpleNamespace

import anthropic
import pytest
import uvicorn

from app.config.model import ModelSettings
from app.gateway.asgi import build_api
from deployments.simulator.__main__ import Server
from tests.support.world import ALIAS, MODEL, World

pytestmark = pytest.mark.unit

ASK = {
    "model": ALIAS,
    "max_tokens": 12,
    "messages": [{"role": "user", "content": "Tell me of the sea"}],
}
PRIORITY = {"extra_body": {"service_tier": "priority"}}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "minLength": 3}},
        "required": ["city"],
    },
}
CARD = {"input": 2, "cached_input": 1, "output": 4}


@contextlib.asynccontextmanager
async def listening(world):
    config = uvicorn.Config(
        build_api(world.services), port=0, lifespan="off", log_config=None, log_level="critical"
    )
    server = Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


@pytest.fixture(params=["vllm", "sglang"])
async def world(tmp_path, request):
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings.load({"rate_card": CARD}, "user_config"), [request.param])
    async with listening(made) as url:
        yield SimpleNamespace(url=url, key=made.key, new_records=made.new_records)
    await made.close()


def options(world, path="/anthropic", **more):
    key = world.key("plain")
    return {"base_url": world.url + path, "api_key": key, "max_retries": 0, **more}


async def sync(world, use, **more):
    """Run ``use`` with the SDK's synchronous client."""

    def run():
        with anthropic.Anthropic(**options(world, **more)) as client:
            return use(client)

    return await asyncio.to_thread(run)


def block_of(message):
    [block] = message.content
    return block


@pytest.mark.parametrize("path", ["/anthropic", ""])
async def test_a_message(world, path):
    message = await sync(world, lambda client: client.messages.create(**ASK, **PRIORITY), path=path)
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert block_of(message).type == "text" and block_of(message).text
    assert message.stop_reason == "max_tokens"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (5, 12)
    assert message.usage.service_tier == "priority"
    [record] = (await world.new_records()).values()
    assert record["served_tier"] == "priority"
    assert float(record["cost"]) == pytest.approx(message.usage.estimated_cost)


async def test_the_headers_of_a_message(world):
    raw = await sync(world, lambda client: client.messages.with_raw_response.create(**ASK))
    assert raw.headers["x-service-tier"] == "default" == raw.parse().usage.service_tier
    assert list(await world.new_records()) == [raw.request_id]


async def test_a_stream(world):
    async with (
        anthropic.AsyncAnthropic(**options(world)) as client,
        client.messages.stream(**ASK, **PRIORITY) as stream,
    ):
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert "".join(texts) == block_of(message).text and len(texts) == 12
    assert (message.usage.input_tokens, message.usage.output_tokens) == (5, 12)
    assert message.usage.service_tier == "priority" and message.stop_reason == "max_tokens"
    # The SDK takes unknown fields of the first event alone: rather no cost than the prompt's.
    assert not hasattr(message.usage, "estimated_cost")


async def test_the_events_of_a_stream(world):
    async with anthropic.AsyncAnthropic(**options(world)) as client:
        events = [event async for event in await client.messages.create(**ASK, stream=True)]
    assert [event.type for event in events] == [
        "message_start", "content_block_start", *["content_block_delta"] * 12,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0].message.usage.service_tier == "default"
    usage = events[-2].usage
    assert (usage.input_tokens, usage.output_tokens, usage.service_tier) == (5, 12, "default")
    [record] = (await world.new_records()).values()
    assert float(record["cost"]) == pytest.approx(usage.estimated_cost)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_tool(world, choice):
    asked = ASK | {"tools": [WEATHER], "tool_choice": choice}
    message = await sync(world, lambda client: client.messages.create(**asked))
    async with (
        anthropic.AsyncAnthropic(**options(world)) as client,
        client.messages.stream(**asked) as stream,
    ):
        streamed = await stream.get_final_message()
    for one in (message, streamed):
        block = block_of(one)
        assert (block.type, block.name, block.input) == ("tool_use", "weather", {"city": "xxx"})
        assert one.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    turns = [
        {"role": "user", "content": "Tell me of the sea"},
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    again = await sync(world, lambda c: c.messages.create(**ASK | {"messages": turns}))
    assert block_of(again).text


async def test_the_count_of_tokens(world):
    asked = {name: ASK[name] for name in ("model", "messages")}
    counted = await sync(world, lambda client: client.messages.count_tokens(**asked))
    assert counted.input_tokens == 5


@pytest.mark.parametrize("path", ["/anthropic", ""])
async def test_the_list_of_models(world, path):
    page = await sync(world, lambda client: client.models.list(limit=1), path=path)
    [model] = page.data
    assert (model.id, model.type, model.display_name) == (MODEL, "model", MODEL)
    assert model.created_at.tzinfo is not None and model.max_input_tokens == 2048
    assert not page.has_next_page() and page.first_id == page.last_id == MODEL
    one = await sync(world, lambda client: client.models.retrieve(ALIAS), path=path)
    assert one == model
    with pytest.raises(anthropic.NotFoundError) as caught:
        await sync(world, lambda client: client.models.retrieve("no/such"), path=path)
    assert caught.value.response.json()["type"] == "error"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"model": "no/such"}, anthropic.NotFoundError),
        ({"max_tokens": -1}, anthropic.BadRequestError),
        ({"service_tier": "gold"}, anthropic.BadRequestError),
    ],
)
async def test_errors(world, more, error):
    with pytest.raises(error) as caught:
        await sync(world, lambda client: client.messages.create(**ASK | more))
    assert caught.value.body["type"] == "error"
    assert caught.value.request_id == caught.value.body["request_id"]


async def test_a_wrong_key(world):
    with pytest.raises(anthropic.AuthenticationError):
        await sync(world, lambda client: client.messages.create(**ASK), api_key="fl-no")


async def test_what_claude_code_sends(world):
    cached = {"cache_control": {"type": "ephemeral"}}
    asked = {
        "model": ALIAS,
        "max_tokens": 2000,
        "stop_sequences": ["\n\nHuman:"],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=abcde;"},
            {"type": "text", "text": "You are a coding agent.", **cached},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<reminder>", **cached}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {
                        "type": "tool_use",
                        "id": "toolu_1",
                        "name": "weather",
                        "input": {"city": "x"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": [{"type": "text", "text": "sunny"}],
                        "is_error": False,
                        **cached,
                    }
                ],
            },
        ],
        "tools": [WEATHER | cached, WEATHER | {"name": "other"}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "user_1_account__session_2"},
        "betas": ["interleaved-thinking-2025-05-14", "claude-code-20250219"],
    }
    async with (
        anthropic.AsyncAnthropic(**options(world)) as client,
        client.beta.messages.stream(**asked) as stream,
    ):
        message = await stream.get_final_message()
    assert block_of(message).text and message.usage.service_tier == "default"
