"""Every route, through the real OpenAI SDK and plain HTTP, on simulated engines."""

import asyncio
import json
from itertools import pairwise

import httpx
import openai
import pytest

from app.cli.listening import listeners, processes
from tests.support.cluster import test_run_processes
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.integration

CHAT = {"model": "native", "messages": [{"role": "user", "content": "hello there"}]}


def test_chat(frontline):
    raw = frontline.client().chat.completions.with_raw_response.create(
        **CHAT, service_tier="priority"
    )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.model == "test/native"
    assert answer.service_tier == "priority"
    assert answer.usage.estimated_cost > 0
    assert raw.headers["x-service-tier"] == "priority"
    assert raw.headers["x-engine"] == "simulated-vllm"
    assert "x-service-tier-reason" not in raw.headers
    assert len(raw.headers.get_list("x-request-id")) == 1


def test_chat_streamed(frontline):
    stream = frontline.client().chat.completions.create(
        **CHAT, service_tier="fast", stream=True, max_tokens=5
    )
    chunks = list(stream)
    assert {chunk.service_tier for chunk in chunks} == {"priority"}
    assert all(chunk.choices for chunk in chunks), "no chunk that was not asked for"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.estimated_cost > 0
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_chat_streamed_with_usage(frontline):
    stream = frontline.client().chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.estimated_cost > 0
    assert {chunk.service_tier for chunk in chunks} == {"default"}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_chat_through_the_asynchronous_client(frontline):
    async with frontline.async_client() as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(**CHAT, service_tier="flex") for _ in range(20))
        )
        assert {answer.service_tier for answer in answers} == {"flex"}
        async with client.chat.completions.stream(**CHAT) as stream:
            final = await stream.get_final_completion()
    assert final.service_tier == "default"


def test_several_choices_in_one_stream(frontline):
    chunks = list(frontline.client().chat.completions.create(**CHAT, n=3, stream=True))
    finished = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert sorted(finished) == [0, 1, 2]
    assert [bool(chunk.usage) for chunk in chunks].count(True) == 1
    assert chunks[-1].usage


@pytest.mark.parametrize("stream", [False, True])
def test_completions(frontline, stream):
    answer = frontline.client().completions.create(
        model="native", prompt="once", stream=stream, extra_body={"service_tier": "priority"}
    )
    answers = list(answer) if stream else [answer]
    assert {part.service_tier for part in answers} == {"priority"}
    assert answers[-1].usage.estimated_cost > 0
    assert "".join(part.choices[0].text for part in answers)


def test_embeddings(frontline):
    raw = frontline.client().embeddings.with_raw_response.create(
        model="native", input=["a", "b c"], extra_body={"service_tier": "priority"}
    )
    answer = raw.parse()
    assert [len(item.embedding) for item in answer.data] == [16, 16]
    assert answer.service_tier == "priority" == raw.headers["x-service-tier"]
    assert answer.usage.estimated_cost == pytest.approx(1.5e-6 * answer.usage.prompt_tokens)


def test_responses(frontline):
    answer = frontline.client().responses.create(
        model="native", input="hello", service_tier="priority"
    )
    assert answer.output_text
    assert answer.service_tier == "priority"
    assert answer.usage.estimated_cost > 0


def test_responses_streamed(frontline):
    events = list(
        frontline.client().responses.create(
            model="native", input="hello", service_tier="priority", stream=True
        )
    )
    assert events[0].type == "response.created"
    assert events[0].response.service_tier == "priority"
    assert events[-1].type == "response.completed"
    assert events[-1].response.service_tier == "priority"
    assert events[-1].response.usage.estimated_cost > 0


def test_models(frontline):
    client = frontline.client()
    models = {model.id: model for model in client.models.list()}
    assert models["test/native"].service_tiers == ["priority", "default", "flex"]
    assert models["test/fcfs"].service_tiers == ["default", "flex"]
    metadata = models["test/native"].metadata
    assert {"priority", "simulated"} <= set(metadata["tags"])
    assert metadata["engines"] == ["simulated-vllm"]
    assert metadata["context_length"] == 4096
    assert metadata["pricing"]["priority"]["output_tokens"] == 3
    assert client.models.retrieve("test/native") == models["test/native"]
    assert client.models.retrieve("native").id == "test/native"


@pytest.mark.parametrize("prefix", ["/v1", "/v1/openai"])
def test_both_prefixes(frontline, prefix):
    with frontline.http() as http:
        assert http.post(f"{prefix}/chat/completions", json=CHAT).status_code == 200
        assert http.get(f"{prefix}/models").json()["data"]
        assert http.get(f"{prefix}/models/test/native").json()["id"] == "test/native"
        assert http.get("/health" if prefix == "/v1" else f"{prefix}/health").status_code == 200


def test_only_this_machine_reaches_what_listens(frontline):
    pids = {process.pid for process in test_run_processes()}
    found = listeners(view for pid, view in processes().items() if pid in pids)
    assert {one.process for one in found} >= {"raylet", "haproxy"}
    assert [one for one in found if not one.on_loopback] == []


def test_health_tells_the_models(frontline):
    with frontline.http() as http:
        models = http.get("/health").json()["models"]
    assert models["test/native"] == "ready"


def test_what_the_engine_supports_passes_through(frontline):
    request = {
        **CHAT,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "seed": 7,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                ],
            }
        ],
        "made_up_field": {"kept": [1, None]},
    }
    with frontline.http() as http, frontline.engine("native") as engine:
        answer = http.post("/v1/chat/completions", json={**request, "service_tier": "default"})
        assert answer.status_code == 200
        seen = engine.get("/simulate").json()["requests"][-1]["body"]
    assert seen == {**request, "model": "test/native", "priority": 0}


def test_a_clients_own_priority_and_engine_headers_never_reach_the_engine(frontline):
    headers = {
        "X-Vllm-Priority": "-999",
        "x-override-priority": "999",
        "Authorization": "Bearer mine",
    }
    body = {**CHAT, "priority": -5, "service_tier": "flex", "fail_fast": False}
    with frontline.http() as http, frontline.engine("native") as engine:
        http.post("/v1/chat/completions", json=body, headers=headers)
        seen = engine.get("/simulate").json()["requests"][-1]
    assert seen["body"]["priority"] == 100
    assert {"service_tier", "fail_fast"}.isdisjoint(seen["body"])
    assert set(seen["headers"]) <= {
        *("host", "accept", "content-type", "content-length", "authorization", "x-request-id")
    }
    assert "mine" not in seen["headers"]["authorization"]


def test_events_leave_as_they_come(frontline):
    with frontline.engine("native") as engine:
        engine.post("/simulate", json={"tokens_per_second": 20})
        try:
            times = asyncio.run(_arrival_times(frontline))
        finally:
            engine.post("/simulate", json={"tokens_per_second": 0})
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sum(gap > 0.02 for gap in gaps) >= 6, gaps


async def _arrival_times(frontline) -> list[float]:
    loop, times = asyncio.get_running_loop(), []
    async with httpx.AsyncClient(base_url=frontline.root, timeout=PATIENCE_S) as http:
        request = {**CHAT, "stream": True, "max_tokens": 10}
        async with http.stream("POST", "/v1/chat/completions", json=request) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    json.loads(line[6:])
                    times.append(loop.time())
    return times


def test_the_sdk_sees_openais_errors(frontline):
    client = frontline.client()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=[])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, service_tier="gold")
    assert caught.value.param == "service_tier"
