"""What is billed where an engine tells usage that cannot be, or none, or the client leaves."""

import asyncio
import json
import re

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.protocol.sse import EventReader, parse_block
from tests.support.world import ALIAS, ENGINES, Seen, World

pytestmark = pytest.mark.unit

CHAT = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 12}
REQUESTS = [
    (Route.CHAT, CHAT),
    (Route.CHAT, {**CHAT, "n": 2}),
    (Route.CHAT, {**CHAT, "stream": True}),
    (Route.CHAT, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    (Route.COMPLETIONS, {"prompt": "hello there", "max_tokens": 12, "stream": True}),
    (Route.RESPONSES, {"input": "hello there", "max_output_tokens": 12}),
    (Route.RESPONSES, {"input": "hello there", "max_output_tokens": 12, "stream": True}),
    (Route.EMBEDDINGS, {"input": "hello there"}),
]
USAGE = re.compile(rb'"usage": ?\{(?:[^{}]|\{[^{}]*\})*\}')
IMPOSSIBLE = [
    *(
        {"prompt_tokens": value, "completion_tokens": value, "input_tokens": value,
         "output_tokens": value}
        for value in (-1, "7", 1.5, True, [], {"a": 1}, 10**12, 2**70)
    ),
    {"prompt_tokens": -5, "input_tokens": -5, "completion_tokens": 3, "output_tokens": 3},
    {"prompt_tokens": 4, "input_tokens": 4, "completion_tokens": -3, "output_tokens": -3},
    {}, [], 7, "x", True, [1],
]  # fmt: skip


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "vllm", {"embedding_dimensions": 4})
    # No engine is slow on purpose here, but the machine may be.
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    yield made
    await made.close()


async def asked(world, route, fields, rewrite=None):
    seen = Seen(None, [], rewrite=rewrite)
    await world.ask(seen, route, {"model": ALIAS, **fields}, "plain")
    return seen


def data_of(seen):
    """Return the data of each event of an answer."""
    blocks = EventReader().blocks(seen.body)
    return [event.data for block in blocks if (event := parse_block(block))]


def told(seen, route, fields):
    """Return the usage that a client was told last."""
    if not fields.get("stream"):
        return json.loads(seen.body)["usage"]
    found = [json.loads(data) for data in data_of(seen) if data != b"[DONE]"]
    usages = [(f.get("response") or f).get("usage") for f in found]
    return [usage for usage in usages if usage][-1]


@pytest.mark.parametrize(("route", "fields"), REQUESTS)
async def test_usage_that_cannot_be_is_estimated_and_said_so(world, route, fields):
    for usage in [None, *IMPOSSIBLE]:
        text = b'"usage":' + json.dumps(usage).encode()
        seen = await asked(world, route, fields, lambda piece, text=text: USAGE.sub(text, piece))
        assert (seen.status, seen.whole) == (200, True), usage
        assert world.taken() == 0
        [record] = (await world.new_records()).values()
        assert (record["state"], record["usage_estimated"]) == ("completed", 1), usage
        assert record["prompt_tokens"] > 0
        assert record["completion_tokens"] > 0 or route is Route.EMBEDDINGS
        names = ("input", "output") if route is Route.RESPONSES else ("prompt", "completion")
        shown = told(seen, route, fields)
        assert [shown[f"{name}_tokens"] for name in names] == [
            record["prompt_tokens"], record["completion_tokens"],
        ]  # fmt: skip
        assert shown["usage_estimated"] is True


async def test_usage_that_is_nothing_beside_text_is_estimated(world):
    nothing = b'"usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3}'
    for stream in (False, True):
        fields = {**CHAT, "stream": stream}
        await asked(world, Route.CHAT, fields, lambda piece: USAGE.sub(nothing, piece))
        [record] = (await world.new_records()).values()
        assert record["completion_tokens"] > 0 and record["usage_estimated"]


async def test_seven_odd_streams_take_no_slot_away(world):
    text = b'"usage":{"prompt_tokens":-1,"completion_tokens":-1,"total_tokens":-2}'
    for _ in range(7):
        await asked(world, Route.CHAT, {**CHAT, "stream": True}, lambda p: USAGE.sub(text, p))
    assert world.taken() == 0
    assert (await asked(world, Route.CHAT, CHAT)).status == 200


async def left(world, route, fields, enough):
    """Ask, leave once the answer so far is ``enough``, and return it with its record."""
    seen = Seen(None, [])
    fields = {"model": ALIAS, "stream": True, **fields}
    asking = asyncio.create_task(world.ask(seen, route, fields, "plain"))
    async with asyncio.timeout(10):
        while not enough(seen.body):
            assert not asking.done(), seen.body[-500:]
            seen.changed.clear()
            await seen.changed.wait()
    asking.cancel()
    await asyncio.wait([asking])
    [record] = (await world.new_records()).values()
    assert record["state"] == "interrupted" and world.taken() == 0
    return seen, record


def events_of(seen):
    return [json.loads(data) for data in data_of(seen)]


async def test_a_response_that_is_left_is_billed_for_what_was_sent(world):
    fields = {"input": "hello there", "max_output_tokens": 400}
    seen, record = await left(
        world, Route.RESPONSES, fields, lambda body: body.count(b".delta") > 80
    )
    deltas = sum(event["type"].endswith(".delta") for event in events_of(seen))
    assert record["completion_tokens"] >= deltas
    assert record["prompt_tokens"] > 0 and record["usage_estimated"] == 1


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (Route.CHAT, {"messages": CHAT["messages"], "n": 3, "max_tokens": 400}),
        (Route.COMPLETIONS, {"prompt": ["hello", "there you are"], "max_tokens": 400}),
        (Route.COMPLETIONS, {"prompt": ["hello", "there"], "n": 2, "max_tokens": 400}),
    ],
)
async def test_all_choices_of_a_stream_that_is_left_are_billed(world, route, fields):
    def choices(body):
        return len(set(re.findall(rb'"index": ?(\d+)', body)))

    count = fields.get("n", 1) * (len(fields["prompt"]) if "prompt" in fields else 1)
    seen, record = await left(
        world, route, fields, lambda body: choices(body) == count and body.count(b"data:") > 90
    )
    texts = [
        choice
        for event in events_of(seen)
        for choice in event["choices"]
        if choice.get("text") or choice.get("delta", {}).get("content")
    ]
    # A few more may have been read from the engine than have left.
    assert len(texts) <= record["completion_tokens"] <= len(texts) + 3 * count
    assert record["usage_estimated"] == 0
    whole = await asked(world, route, {**fields, "max_tokens": 1})
    assert record["prompt_tokens"] == json.loads(whole.body)["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_cannot_be_written_again_is_not_billed(world, stream):
    deep = b'"x":' + b"[" * 400 + b"]" * 400 + b',"usage":'
    seen = await asked(
        world, Route.CHAT, {**CHAT, "stream": stream}, lambda p: p.replace(b'"usage":', deep)
    )
    [record] = (await world.new_records()).values()
    assert world.taken() == 0
    if stream:
        assert b'"error"' in seen.body and record["state"] == "interrupted"
    else:
        assert seen.status == 500 and b'"server_error"' in seen.body
        assert (record["state"], record["cost"]) == ("failed", "0")


@pytest.mark.parametrize(
    "junk", [b"data: {\n\n", b"data: 7\n\n", b"data: []\n\n", b"data: null\n\n"]
)
async def test_one_bad_chunk_takes_nothing_from_those_before_it(world, junk):
    seen = await asked(
        world, Route.CHAT, {**CHAT, "stream": True},
        lambda p: p.replace(b"data: [DONE]\n\n", junk + b"data: [DONE]\n\n"),
    )  # fmt: skip
    events = data_of(seen)
    assert b"[DONE]" not in events
    assert "error" in json.loads(events[-1])
    assert len(events) > 10
    [record] = (await world.new_records()).values()
    assert (record["state"], record["completion_tokens"]) == ("interrupted", 12)
