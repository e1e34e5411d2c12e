"""The simulated engine as a process: driven by the openai package, and by plain HTTP for what the
package hides."""

from __future__ import annotations

import asyncio
import base64
import itertools
import math
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import orjson
import pytest

from app.core.dialect import AUDIO_ROUTES, OPENAI_ROUTES, POOLED_ROUTES, PRIORITY_ROUTES, Route
from app.core.settings import SettingsError
from app.core.tiers import Tier
from app.protocol.json_body.spliced import Spliced
from deployments.engines.base import EngineContractError, EngineFacts, Launch
from deployments.engines.simulated import Simulated
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.unit

KEY = "secret-of-this-engine"
MODEL = "acme/simulated-1b"
HEADERS = {"authorization": f"Bearer {KEY}"}
TLS = ssl.create_default_context()
"""Shared, because each HTTP client would spend longer making its own than on its requests."""
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me of the sea"}]}
PROMPTS = {
    Route.CHAT: CHAT,
    Route.COMPLETIONS: {"model": MODEL, "prompt": "Tell me of the sea"},
    Route.EMBEDDINGS: {"model": MODEL, "input": "Tell me of the sea"},
    Route.RESPONSES: {"model": MODEL, "input": "Tell me of the sea"},
    Route.MESSAGES: CHAT | {"max_tokens": 8},
    Route.COUNT_TOKENS: CHAT,
    Route.TOKENIZE: {"model": MODEL, "prompt": "Tell me of the sea"},
    Route.DETOKENIZE: {"model": MODEL, "tokens": []},
    Route.RERANK: {"model": MODEL, "query": "sea", "documents": ["the sea", "a b"]},
    Route.SCORE: {"model": MODEL, "text_1": "sea", "text_2": "the sea"},
    Route.CLASSIFY: {"model": MODEL, "input": "Tell me of the sea"},
    Route.POOLING: {"model": MODEL, "input": "Tell me of the sea"},
}
BY_BODY = [Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS, Route.RESPONSES]
RANKING = [Route.RERANK, Route.SCORE]
ROUTES = {
    "vllm": [*(frozenset(Route) - POOLED_ROUTES - AUDIO_ROUTES), *RANKING],
    "sglang": list(frozenset(Route) - POOLED_ROUTES - AUDIO_ROUTES),
    "tensorrt_llm": BY_BODY,
}
"""The routes of each dialect."""


@dataclass
class Engine:
    """A running simulated engine, started as an engine replica starts it."""

    process: subprocess.Popen[str]
    launch: Launch

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.launch.port}"

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=HEADERS, timeout=PATIENCE_S, verify=TLS)

    def async_http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers=HEADERS, timeout=PATIENCE_S, verify=TLS)

    @contextmanager
    def streaming(self) -> Iterator[Iterator[bytes]]:
        """Give a stream of which the first piece has come."""
        with (
            self.http() as http,
            http.stream("POST", Route.CHAT.path, json={**CHAT, "stream": True}) as answer,
        ):
            # Kept, because httpx breaks the connection when the iterator is forgotten.
            pieces = answer.iter_raw()
            next(pieces)
            yield pieces

    def post(self, route: Route, body: dict[str, Any], **options: Any) -> httpx.Response:
        with self.http() as http:
            return http.post(route.path, json={**PROMPTS[route], **body}, **options)

    def get(self, path: str) -> httpx.Response:
        with self.http() as http:
            return http.get(path)

    def seen(self) -> dict[str, Any]:
        report: dict[str, Any] = self.get("/simulate").json()
        return report

    def change(self, **change: Any) -> None:
        with self.http() as http:
            assert http.post("/simulate", json=change).status_code == 200

    def sdk(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=KEY,
            max_retries=0,
            http_client=httpx.Client(verify=TLS),
        )

    def wait_until(self, holds: Callable[[dict[str, Any]], bool], seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while not holds(seen := self.seen()):
            assert time.monotonic() < deadline, seen
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def launched(**engine_args: Any) -> Launch:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Launch("/models/none", MODEL, "127.0.0.1", port, 4, KEY, sys.executable, engine_args)


def start(**engine_args: Any) -> Engine:
    launch, adapter = launched(**engine_args), Simulated()
    process = subprocess.Popen(
        adapter.command(launch),
        env={**os.environ, **adapter.environment(launch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    return Engine(process, launch)


def wait_until_ready(engine: Engine) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and engine.process.poll() is None:
        try:
            if engine.get(Simulated.ready_path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    engine.process.kill()
    raise AssertionError(engine.process.communicate()[0])


def unpaced(dialect: str) -> Iterator[Engine]:
    engine = start(dialect=dialect, tokens_per_second=0, embedding_dimensions=8)
    try:
        wait_until_ready(engine)
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def _vllm() -> Iterator[Engine]:
    yield from unpaced("vllm")


@pytest.fixture(scope="module")
def _sglang() -> Iterator[Engine]:
    yield from unpaced("sglang")


@pytest.fixture(scope="module")
def _tensorrt_llm() -> Iterator[Engine]:
    yield from unpaced("tensorrt_llm")


def pristine(engine: Engine) -> Engine:
    engine.change(failures={}, tokens_per_second=0, first_token_seconds=0, forget=True)
    return engine


@pytest.fixture
def vllm(_vllm: Engine) -> Engine:
    return pristine(_vllm)


@pytest.fixture
def sglang(_sglang: Engine) -> Engine:
    return pristine(_sglang)


@pytest.fixture
def tensorrt_llm(_tensorrt_llm: Engine) -> Engine:
    return pristine(_tensorrt_llm)


@pytest.fixture(params=["vllm", "sglang", "tensorrt_llm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture
def spawn() -> Iterator[Callable[..., Engine]]:
    """Starts engines of a test's own, which it may kill."""
    started: list[Engine] = []

    def spawn(*, ready: bool = True, **engine_args: Any) -> Engine:
        engine = start(**engine_args)
        started.append(engine)
        if ready:
            wait_until_ready(engine)
        return engine

    yield spawn
    for engine in started:
        engine.stop()


def events(body: str) -> list[Any]:
    """Return the data of a stream's events."""
    data = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    return [part if part == "[DONE]" else orjson.loads(part) for part in data]


def text_of(chunks: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        if chunk != "[DONE]"
        for choice in chunk["choices"]
    )


# With the openai package


def test_chat_completes_and_streams_the_same_words(engine: Engine) -> None:
    with engine.sdk() as sdk:
        whole = sdk.chat.completions.create(**CHAT, max_tokens=12)
        with sdk.chat.completions.create(
            **CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
    text = whole.choices[0].message.content
    assert text is not None and len(text.split()) == 12
    assert whole.choices[0].finish_reason == "length"
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(parts) == text
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None
        counts = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        assert counts == (5, 12, 17)


def test_completions_take_a_batch_and_n(engine: Engine) -> None:
    with engine.sdk() as sdk:
        answer = sdk.completions.create(model=MODEL, prompt=["one", "two"], n=2, max_tokens=3)
        with sdk.completions.create(
            model=MODEL, prompt=["one", "two"], n=2, max_tokens=3, stream=True
        ) as stream:
            streamed = [""] * 4
            for chunk in stream:
                streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 4
    assert streamed == texts
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 12)


def test_a_text_ranks_by_its_likeness_to_others(vllm: Engine) -> None:
    documents = ["a b", "sea", "c"]
    answer = vllm.post(Route.RERANK, {"documents": documents, "top_n": 2}).json()
    assert answer["results"][0]["index"] == 1 and len(answer["results"]) == 2
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    scores = vllm.post(Route.SCORE, {"text_1": ["sea", "c"], "text_2": ["sea", "d"]}).json()
    assert scores["data"][0]["score"] == pytest.approx(1) and len(scores["data"]) == 2
    assert vllm.post(Route.SCORE, {"text_1": ["a", "b"], "text_2": ["c"] * 3}).status_code == 400


def test_embeddings_are_unit_vectors_in_either_encoding(engine: Engine) -> None:
    with engine.sdk() as sdk:
        # The package asks for base64 and decodes it.
        answer = sdk.embeddings.create(model=MODEL, input=["a b", "c"])
        plain = sdk.embeddings.create(model=MODEL, input="a b", encoding_format="float")
        encoded = sdk.embeddings.create(model=MODEL, input="a b", encoding_format="base64")
    vector = answer.data[0].embedding
    assert len(vector) == 8
    assert math.isclose(sum(value * value for value in vector), 1, rel_tol=1e-5)
    assert plain.data[0].embedding == vector != answer.data[1].embedding
    packed: Any = encoded.data[0].embedding
    assert list(struct.unpack("<8f", base64.b64decode(packed))) == vector
    assert answer.usage.prompt_tokens == 3


def test_responses_answer_and_stream(engine: Engine) -> None:
    with engine.sdk() as sdk:
        whole = sdk.responses.create(model=MODEL, input="Tell me of the sea", max_output_tokens=4)
        with sdk.responses.create(
            model=MODEL, input="Tell me of the sea", max_output_tokens=4, stream=True
        ) as stream:
            streamed = list(stream)
    assert len(whole.output_text.split()) == 4
    assert whole.status == "incomplete"
    assert [event.type for event in streamed] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 4,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in streamed] == list(range(12))
    last = streamed[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None and last.response.usage.output_tokens == 4


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_response_calls_a_forced_function_with_what_its_parameters_need(
    engine: Engine, choice: Any
) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    look: Any = {"type": "function", "name": "look", "parameters": city, "strict": False}
    asked: Any = {"input": "x", "tools": [{"type": "web_search"}, look], "tool_choice": choice}
    with engine.sdk() as sdk:
        whole = sdk.responses.create(model=MODEL, **asked)
        with sdk.responses.create(model=MODEL, **asked, stream=True) as stream:
            streamed = list(stream)
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.name, orjson.loads(call.arguments)) == ("look", {"city": ""})
    last = streamed[-1]
    assert last.type == "response.completed"
    (again,) = last.response.output
    assert again.type == "function_call" and again.arguments == call.arguments


def test_a_forced_function_is_called(engine: Engine) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
    with engine.sdk() as sdk:
        for choice in ({"type": "function", "function": {"name": "look"}}, "required"):
            forced: Any = {"tools": [tool], "tool_choice": choice}
            answer = sdk.chat.completions.create(**CHAT, **forced)
            (call,) = answer.choices[0].message.tool_calls or []
            assert call.type == "function"
            assert (call.function.name, call.function.arguments) == ("look", "{}")
            with sdk.chat.completions.create(**CHAT, **forced, stream=True) as stream:
                calls = [
                    call
                    for chunk in stream
                    for part in chunk.choices
                    for call in part.delta.tool_calls or []
                ]
            assert [call.function and call.function.name for call in calls] == ["look"]


def test_the_models_list_says_that_it_is_simulated(engine: Engine) -> None:
    with engine.sdk() as sdk:
        (model,) = sdk.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "frontline-simulated")
    answer = engine.get("/version")
    assert answer.json() == {"version": "simulated-1"}
    assert answer.headers["server"] == "frontline-simulated/simulated-1"


# Shapes


def test_vllm_chunks_have_vllms_fields(vllm: Engine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 2, "stream": True, "stream_options": options}
    answer = vllm.post(Route.CHAT, body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    role, first, final, usage, done = events(answer.text)
    assert list(role) == [
        *("id", "object", "created", "model", "choices"),
        *("usage", "prompt_token_ids", "prompt_text"),
    ]
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert list(first["choices"][0]) == ["index", "delta", "logprobs", "finish_reason", "token_ids"]
    assert first["usage"]["completion_tokens"] == 1
    assert final["choices"][0]["finish_reason"] == "length"
    assert final["usage"]["total_tokens"] == 7
    assert usage["choices"] == []
    details = {"cached_tokens": 0, "created_cache_tokens": 0}
    assert usage["usage"]["prompt_tokens_details"] == details
    assert done == "[DONE]"
    assert not any("service_tier" in chunk for chunk in (role, first, final, usage))


def test_vllm_counts_on_each_chunk_only_together_with_usage(vllm: Engine) -> None:
    body = {"stream": True, "stream_options": {"continuous_usage_stats": True}, "max_tokens": 2}
    chunks = events(vllm.post(Route.CHAT, body).text)
    assert len(chunks) == 4 and not any("usage" in chunk for chunk in chunks[:-1])


def test_sglang_counts_on_each_chunk_whenever_asked(sglang: Engine) -> None:
    body = {"stream": True, "stream_options": {"continuous_usage_stats": True}, "max_tokens": 2}
    role, first, second, end, _ = events(sglang.post(Route.CHAT, body).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in (first, second)] == [1, 2]
    assert "usage" not in role and "usage" not in end


def test_vllm_answers_carry_a_null_service_tier(vllm: Engine) -> None:
    for route in (Route.CHAT, Route.COMPLETIONS):
        answer = vllm.post(route, {"max_tokens": 1, "service_tier": "priority"}).json()
        assert answer["service_tier"] is None
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_only_vllm_echoes_the_tier_of_a_response(engine: Engine) -> None:
    answer = engine.post(Route.RESPONSES, {"service_tier": "flex"}).json()
    name = engine.launch.engine_args["dialect"]
    assert answer.get("service_tier") == ("flex" if name == "vllm" else None)
    if name == "vllm":
        assert engine.post(Route.RESPONSES, {}).json()["service_tier"] == "auto"
        assert engine.post(Route.RESPONSES, {"service_tier": "fast"}).status_code == 400


def test_sglang_gives_each_choice_of_a_stream_an_id_of_its_own(sglang: Engine) -> None:
    *chunks, _ = events(sglang.post(Route.CHAT, {"n": 2, "max_tokens": 2, "stream": True}).text)
    ids = {(chunk["choices"][0]["index"], chunk["id"]) for chunk in chunks}
    assert sorted(index for index, _ in ids) == [0, 1]
    assert len({id_ for _, id_ in ids}) == 2


def test_sglang_quotes_what_was_wrong_and_where_in_its_source(sglang: Engine) -> None:
    message = sglang.post(Route.CHAT, {"max_tokens": "many"}).json()["message"]
    assert message.startswith("1 validation error:\n  {'type': 'int_parsing', 'loc': ('body', ")
    assert "http_server.py" in message


def test_sglang_ends_a_choice_in_a_chunk_of_its_own(sglang: Engine) -> None:
    chunks = events(sglang.post(Route.CHAT, {"max_tokens": 2, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"reasoning_content": None, "role": "assistant", "content": ""}
    assert deltas[-1] == {"reasoning_content": None}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons == [None, None, None, "length"]


def test_tensorrt_llm_leaves_nulls_out_of_its_chunks(tensorrt_llm: Engine) -> None:
    answer = tensorrt_llm.post(Route.CHAT, {"max_tokens": 2, "stream": True, "stream_options": {}})
    role, first, final, usage, done = events(answer.text)
    assert role["choices"] == [{"index": 0, "delta": {"role": "assistant"}}]
    assert list(first["choices"][0]) == ["index", "delta"]
    assert final["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 2, "usage is on once there are stream options"
    assert done == "[DONE]"


def test_stop_strings_cut_the_answer(engine: Engine) -> None:
    whole = engine.post(Route.CHAT, {"max_tokens": 20}).json()["choices"][0]["message"]["content"]
    words = whole.split()
    stop = words[5]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["never said", stop]):
        choice = engine.post(Route.CHAT, {"max_tokens": 20, "stop": given}).json()["choices"][0]
        assert choice["message"]["content"] == expected
        assert choice["finish_reason"] == "stop"
        chunks = events(
            engine.post(Route.CHAT, {"max_tokens": 20, "stop": given, "stream": True}).text
        )
        assert text_of(chunks) == expected


def test_json_is_the_smallest_that_fits(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "minimum": 3},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1},
            "note": {"type": "string"},
        },
        "required": ["colour", "count", "tags"],
        "$defs": {"tag": {"type": "string", "minLength": 2}},
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bottomless = {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": bottomless}}
    assert engine.post(Route.CHAT, {"response_format": asked}).status_code == 400
    for given, expected in (
        ({"type": "json_object"}, {}),
        (format_, {"colour": "red", "count": 3, "tags": ["xx"]}),
    ):
        for stream in (False, True):
            answer = engine.post(Route.CHAT, {"response_format": given, "stream": stream})
            if stream:
                content = text_of(events(answer.text))
            else:
                content = answer.json()["choices"][0]["message"]["content"]
            assert orjson.loads(content) == expected


def test_log_probabilities_are_well_formed(engine: Engine) -> None:
    asked = {"logprobs": True, "top_logprobs": 1, "max_tokens": 3}
    content = engine.post(Route.CHAT, asked).json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [1, 1, 1]
    chunks = events(engine.post(Route.CHAT, {**asked, "stream": True}).text)
    parts = [chunk["choices"][0].get("logprobs") for chunk in chunks[:-1]]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    choice = engine.post(Route.COMPLETIONS, {"logprobs": 1, "max_tokens": 3}).json()["choices"][0]
    lengths = [len(values) for values in choice["logprobs"].values()]
    assert lengths == [3, 3, 3, 3]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_lengths(engine: Engine) -> None:
    def length(body: dict[str, Any]) -> tuple[int, str]:
        answer = engine.post(Route.CHAT, body).json()
        return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

    assert length({}) == (64, "stop")
    assert length({"min_tokens": 80}) == (80, "stop")
    assert length({"max_tokens": 100}) == (100, "length")
    assert length({"max_completion_tokens": 7}) == (7, "length")
    assert length({"ignore_eos": True}) == (4096 - 5, "length")


def test_a_repeated_prompt_is_cached_in_blocks(engine: Engine) -> None:
    prompt = " ".join(f"w{number}" for number in range(40)) + f" {time.monotonic_ns()}"
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
    cached = [
        engine.post(Route.CHAT, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached[1] == 32 and cached[0] in (0, 32)


# Strictness and errors


def test_every_route_demands_the_key(engine: Engine) -> None:
    paths = [("POST", route.path) for route in Route]
    paths += [("GET", path) for path in ("/v1/models", "/health", "/ready", "/metrics")]
    paths += [("GET", "/version"), ("GET", "/simulate"), ("POST", "/simulate"), ("GET", "/none")]
    with httpx.Client(base_url=engine.url, verify=TLS, timeout=PATIENCE_S) as http:
        for (method, path), key in itertools.product(paths, ({}, {"authorization": "Bearer no"})):
            answer = http.request(method, path, headers=key, json={} if method == "POST" else None)
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert engine.seen()["received"] == 0


@pytest.mark.parametrize("route", [route for route in Route if not route.is_form])
def test_unknown_fields(engine: Engine, route: Route) -> None:
    dialect = engine.launch.engine_args["dialect"]
    strict = dialect == "tensorrt_llm" and route is not Route.RESPONSES
    if route not in ROUTES[str(dialect)]:
        assert engine.post(route, {}).status_code == 404
        return
    answer = engine.post(route, {"service_tier": "default", "prompt_cache_key": "x"})
    assert answer.status_code == (400 if strict else 200)
    if strict:
        assert "Extra inputs are not permitted" in answer.json()["error"]


def test_error_shapes(vllm: Engine, sglang: Engine, tensorrt_llm: Engine) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 5000}]}
    error = vllm.post(Route.CHAT, long)
    assert error.status_code == 400
    assert list(error.json()["error"]) == ["message", "type", "param", "code"]
    assert error.json()["error"]["code"] == 400
    assert "maximum context length is 4096 tokens" in error.json()["error"]["message"]
    error = sglang.post(Route.CHAT, long)
    assert error.status_code == 400
    assert list(error.json()) == ["object", "message", "type", "param", "code"]
    assert "longer than the model's context length (4096 tokens)" in error.json()["message"]
    assert "error" in sglang.post(Route.RESPONSES, {"model": "no"}).json()
    error = tensorrt_llm.post(Route.CHAT, long)
    assert error.status_code == 400
    assert error.json()["type"] == "BadRequestError"
    assert "should not exceed max_num_tokens (4096)" in error.json()["message"]


def test_unknown_models(vllm: Engine, sglang: Engine, tensorrt_llm: Engine) -> None:
    for route in ROUTES["vllm"]:
        answer = vllm.post(route, {"model": "no/such"})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"
    assert sglang.post(Route.CHAT, {"model": "no/such"}).json()["model"] == "no/such"
    assert sglang.post(Route.RESPONSES, {"model": "no/such"}).status_code == 404
    assert tensorrt_llm.post(Route.CHAT, {"model": "no/such"}).json()["model"] == "no/such"


def test_wrong_bodies(engine: Engine) -> None:
    for route in ROUTES[str(engine.launch.engine_args["dialect"])]:
        with engine.http() as http:
            for content in (b"{", b"[]", b'{"model":3}'):
                answer = http.post(route.path, content=content)
                assert answer.status_code == 400, content
    assert engine.post(Route.CHAT, {"n": 0}).status_code == 400
    assert engine.post(Route.CHAT, {"max_tokens": 0}).status_code == 400
    assert engine.post(Route.CHAT, {"priority": "high"}).status_code == 400
    with engine.http() as http:
        assert http.get(Route.CHAT.path).status_code == 405
        assert http.get("/v1/none").status_code == 404


def test_stream_options_without_a_stream(
    vllm: Engine, sglang: Engine, tensorrt_llm: Engine
) -> None:
    body = {"stream_options": {"include_usage": True}}
    assert vllm.post(Route.CHAT, body).status_code == 400
    assert sglang.post(Route.CHAT, body).status_code == 200
    assert tensorrt_llm.post(Route.CHAT, body).status_code == 400
    assert tensorrt_llm.post(Route.COMPLETIONS, body).status_code == 400


def test_tensorrt_llm_priorities_lie_between_0_and_1(tensorrt_llm: Engine) -> None:
    assert tensorrt_llm.post(Route.CHAT, {"priority": 1}).status_code == 200
    assert tensorrt_llm.post(Route.CHAT, {"priority": 1.5}).status_code == 400
    assert tensorrt_llm.post(Route.CHAT, {"priority": -100}).status_code == 400
    assert tensorrt_llm.post(Route.EMBEDDINGS, {"priority": 0.5}).status_code == 400


def test_metrics_have_the_engines_names(vllm: Engine, sglang: Engine, tensorrt_llm: Engine) -> None:
    assert 'vllm:num_requests_waiting{engine="0"' in vllm.get("/metrics").text
    assert "sglang:num_queue_reqs{" in sglang.get("/metrics").text
    assert tensorrt_llm.get("/metrics").json()[0]["numQueuedRequests"] == 0
    assert "trtllm_num_requests_running{" in tensorrt_llm.get("/prometheus/metrics").text


# What it has seen


def test_it_tells_what_reached_it(vllm: Engine) -> None:
    vllm.post(Route.CHAT, {"priority": -100}, headers={"X-Vllm-Priority": "-7", "X-Mine": "a"})
    vllm.post(Route.COMPLETIONS, {"priority": 100})
    seen = vllm.seen()
    first, second = seen["requests"]
    assert first["path"] == "/v1/chat/completions"
    assert first["body"]["priority"] == -100
    assert first["headers"]["x-mine"] == "a"
    assert seen["received"] == 2 and seen["max_running"] == 1
    assert seen["running"] == seen["waiting"] == seen["aborted"] == 0
    assert seen["starts"] == [{"number": 1, "priority": -7}, {"number": 2, "priority": 100}]
    assert second["number"] == 2


def test_the_sign_and_routes_of_priority(
    vllm: Engine, sglang: Engine, tensorrt_llm: Engine
) -> None:
    def taken(engine: Engine, value: float, by_body: bool = True, **headers: str) -> list[float]:
        for route in BY_BODY if by_body else [Route.MESSAGES]:
            engine.post(route, {"priority": value}, headers=headers)
        return [start["priority"] for start in engine.seen()["starts"]]

    assert taken(vllm, 5) == [5, 5, 5, 5]
    assert taken(pristine(vllm), 5, **{"X-Vllm-Priority": "9"}) == [9, 9, 5, 9]
    assert taken(sglang, 5) == [5, 5, 5, 0]
    assert taken(tensorrt_llm, 1) == [1, 1, 0.5], "embeddings with a priority are refused"
    for engine, header in ((vllm, "X-Vllm-Priority"), (sglang, "X-Override-Priority")):
        assert taken(pristine(engine), 5, False) == [0], "only the header counts"
        assert taken(pristine(engine), 5, False, **{header: "9"}) == [9]


# Slots, pace, disconnects


async def test_waiting_requests_start_by_priority(spawn: Callable[..., Engine]) -> None:
    # The first request holds the only slot until its client gives up.
    hang = {"request": "hang", "at_request": 1, "after_tokens": 1}
    engine = await asyncio.to_thread(
        spawn, slots=1, tokens_per_second=0, failures=hang, preemption=False
    )
    async with engine.async_http() as http:
        tasks = []
        for number, priority in enumerate((0, 100, 0, -100, 0, -100)):
            body = {**CHAT, "priority": priority}
            tasks.append(asyncio.create_task(http.post(Route.CHAT.path, json=body)))
            while (await http.get("/simulate")).json()["received"] <= number:
                await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.gather(*tasks[1:])
        seen = (await http.get("/simulate")).json()
    assert [start["priority"] for start in seen["starts"]] == [0, -100, -100, 0, 0, 100]
    assert (seen["max_running"], seen["aborted"]) == (1, 1)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_a_victim_goes_on_where_it_was(spawn: Callable[..., Engine], dialect: str) -> None:
    engine = await asyncio.to_thread(spawn, dialect=dialect, slots=1, tokens_per_second=20)
    async with engine.async_http() as http, asyncio.timeout(10):
        received = b""
        body = {**CHAT, "max_tokens": 400, "stream": True}
        async with http.stream("POST", Route.CHAT.path, json=body) as victim:
            pieces = victim.aiter_raw()
            received += await anext(pieces)
            # From the next start of a request on, so that what is left comes at once.
            await http.post("/simulate", json={"tokens_per_second": 0})
            await http.post(Route.CHAT.path, json={**CHAT, "priority": -100})
            async for piece in pieces:
                received += piece
        seen = (await http.get("/simulate")).json()
    chunks = events(received.decode())
    assert len(text_of(chunks).split()) == 400 and chunks[-1] == "[DONE]"
    assert [start["number"] for start in seen["starts"]] == [1, 2, 1]
    assert seen["preempted"] == 1


def test_streams_keep_their_pace(vllm: Engine) -> None:
    vllm.change(tokens_per_second=200, first_token_seconds=0.1)
    with vllm.http() as http:
        began = time.monotonic()
        body = {**CHAT, "max_tokens": 41, "stream": True}
        with http.stream("POST", Route.CHAT.path, json=body) as answer:
            arrivals = [time.monotonic() - began for _ in answer.iter_raw()]
    assert arrivals[0] >= 0.1
    assert arrivals[-1] >= 0.1 + 40 / 200
    assert len(arrivals) > 1, "it streams"


def test_a_disconnect_frees_the_slot_at_once(vllm: Engine) -> None:
    vllm.change(tokens_per_second=10)
    with vllm.streaming():
        assert vllm.seen()["running"] == 1
    vllm.wait_until(lambda seen: seen["running"] == 0 and seen["aborted"] == 1, seconds=1.5)


def test_a_disconnect_of_a_waiting_request_is_noticed(spawn: Callable[..., Engine]) -> None:
    engine = spawn(slots=1, tokens_per_second=2)
    with engine.streaming():
        with engine.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post(Route.CHAT.path, json=CHAT, timeout=0.2)
        engine.wait_until(lambda seen: seen["waiting"] == 0 and seen["aborted"] == 1)


def test_tensorrt_llm_notices_a_disconnect_a_second_later(tensorrt_llm: Engine) -> None:
    tensorrt_llm.change(tokens_per_second=10)
    with tensorrt_llm.streaming():
        left = time.monotonic()
    tensorrt_llm.wait_until(lambda seen: seen["running"] == 0)
    assert time.monotonic() - left > 0.9


# Failures


def test_a_crash_before_the_first_byte_and_after_some_tokens(
    spawn: Callable[..., Engine],
) -> None:
    engine = spawn(tokens_per_second=0, failures={"request": "crash", "at_request": 2})
    assert engine.post(Route.CHAT, {}).status_code == 200
    with pytest.raises(httpx.TransportError):
        engine.post(Route.CHAT, {})
    assert engine.process.wait(5) == -signal.SIGKILL

    engine = spawn(tokens_per_second=0)
    engine.change(failures={"request": "crash", "after_tokens": 3})
    received = b""
    with engine.http() as http, pytest.raises(httpx.RemoteProtocolError):
        body = {**CHAT, "stream": True}
        with http.stream("POST", Route.CHAT.path, json=body) as answer:
            for piece in answer.iter_raw():
                received += piece
    assert len(text_of(events(received.decode())).split()) == 3
    assert engine.process.wait(5) == -signal.SIGKILL


def test_a_hang_keeps_the_slot_until_the_client_goes(vllm: Engine) -> None:
    vllm.change(failures={"request": "hang", "after_tokens": 2})
    for stream in (False, True):
        with vllm.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post(Route.CHAT.path, json={**CHAT, "stream": stream}, timeout=0.15)
        vllm.wait_until(lambda seen: seen["running"] == 0)
    vllm.change(failures={"request": "hang"})
    with vllm.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post(Route.CHAT.path, json=CHAT, timeout=0.15)


def test_errors_that_are_asked_for(vllm: Engine, sglang: Engine) -> None:
    vllm.change(failures={"request": "error", "at_request": 1})
    assert vllm.post(Route.CHAT, {}).status_code == 500
    assert vllm.post(Route.CHAT, {}).status_code == 200
    vllm.change(failures={"request": "error_event", "after_tokens": 2})
    *_, error, done = events(vllm.post(Route.CHAT, {"stream": True}).text)
    assert error["error"]["code"] == 500 and done == "[DONE]"
    sglang.change(failures={"request": "error_event", "status": 503})
    answer = sglang.post(Route.CHAT, {"stream": True})
    error, done = events(answer.text)
    assert answer.status_code == 200
    assert error["error"]["code"] == 503 and done == "[DONE]"
    assert sglang.post(Route.CHAT, {}).status_code == 503


def test_an_error_ends_tensorrt_llms_streams_by_route(tensorrt_llm: Engine) -> None:
    tensorrt_llm.change(failures={"request": "error_event", "after_tokens": 2})
    with pytest.raises(httpx.RemoteProtocolError):
        tensorrt_llm.post(Route.CHAT, {"stream": True, "max_tokens": 5})
    *_, error, done = events(tensorrt_llm.post(Route.COMPLETIONS, {"stream": True}).text)
    assert error["error"]["type"] == "server_error" and done == "[DONE]"


@pytest.mark.parametrize(
    ("body", "blamed"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, "include_obfuscation"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"n": None}, "n"),
    ],
)
def test_tensorrt_llm_is_strict_within_its_fields(
    tensorrt_llm: Engine, body: dict[str, Any], blamed: str
) -> None:
    answer = tensorrt_llm.post(Route.CHAT, body)
    assert answer.status_code == 400 and f"'{blamed}')" in answer.json()["error"]


def test_a_build_can_lack_a_field_and_a_server_its_key(spawn: Callable[..., Engine]) -> None:
    engine = spawn(dialect="tensorrt_llm", lacking_fields=["priority"], guarded=False)
    answer = httpx.post(engine.url + Route.CHAT.path, json={**CHAT, "priority": 1}, verify=TLS)
    assert answer.status_code == 400 and "('body', 'priority')" in answer.json()["error"]
    with pytest.raises(SettingsError, match="lacking_fields"):
        Simulated().command(launched(lacking_fields=["priority"]))


def test_truncated_streams(tensorrt_llm: Engine) -> None:
    body = {"stream": True, "max_tokens": 5}
    tensorrt_llm.change(failures={"request": "truncate", "after_tokens": 2})
    with pytest.raises(httpx.RemoteProtocolError):
        tensorrt_llm.post(Route.CHAT, body)
    assert tensorrt_llm.post(Route.CHAT, {"max_tokens": 5}).status_code == 200
    tensorrt_llm.change(failures={"request": "truncate_cleanly", "after_tokens": 2})
    chunks = events(tensorrt_llm.post(Route.CHAT, body).text)
    assert len(text_of(chunks).split()) == 2 and "[DONE]" not in chunks


def test_an_engine_that_is_full_answers_503(spawn: Callable[..., Engine]) -> None:
    for dialect, in_band in (("vllm", False), ("sglang", True)):
        engine = spawn(dialect=dialect, slots=1, max_waiting=0, tokens_per_second=2)
        with engine.streaming():
            assert engine.post(Route.CHAT, {}).status_code == 503
            refused = engine.post(Route.CHAT, {"stream": True})
            assert refused.status_code == (200 if in_band else 503)
            if in_band:
                assert events(refused.text)[0]["error"]["code"] == 503


def test_health_can_hang(vllm: Engine) -> None:
    vllm.change(failures={"health_hangs": True})
    with vllm.http() as http, pytest.raises(httpx.ReadTimeout):
        http.get("/health", timeout=0.1)


def test_changes_are_checked(vllm: Engine) -> None:
    with vllm.http() as http:
        answer = http.post("/simulate", json={"failures": {"request": "explode"}})
        assert answer.status_code == 400
        assert "simulate.failures.request" in answer.json()["error"]["message"]
        assert http.post("/simulate", json={"speed": 3}).status_code == 400


# Life and death


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_it_may_fail_to_start(spawn: Callable[..., Engine], dialect: str) -> None:
    engine = spawn(ready=False, dialect=dialect, failures={"start": "no GPU in sight"})
    output, _ = engine.process.communicate(timeout=10)
    assert engine.process.returncode == 1
    assert "no GPU in sight" in output


def test_only_sglang_listens_before_it_is_ready(spawn: Callable[..., Engine]) -> None:
    vllm = spawn(ready=False, startup_seconds=30)
    sglang = spawn(ready=False, dialect="sglang", startup_seconds=30)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert sglang.get("/ready").status_code == 503
            break
        except httpx.ConnectError:
            time.sleep(0.02)
    else:
        raise AssertionError("it does not listen")
    with pytest.raises(httpx.ConnectError):
        vllm.get("/ready")
    sglang.process.terminate()
    assert sglang.process.wait(5) == 0


def test_sigterm_lets_streams_finish(spawn: Callable[..., Engine]) -> None:
    engine = spawn(tokens_per_second=50)
    received = b""
    with engine.http() as http:
        body = {**CHAT, "stream": True, "max_tokens": 15}
        with http.stream("POST", Route.CHAT.path, json=body) as answer:
            for piece in answer.iter_raw():
                if not received:
                    engine.process.terminate()
                received += piece
    assert events(received.decode())[-1] == "[DONE]"
    assert engine.process.wait(5) == 0


def test_sigterm_can_be_ignored_and_a_child_left_behind(spawn: Callable[..., Engine]) -> None:
    engine = spawn(failures={"ignore_sigterm": True, "leave_child": True})
    child = engine.seen()["child_pid"]
    try:
        engine.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            engine.process.wait(0.2)
        engine.process.kill()
        engine.process.wait(5)
        os.kill(child, 0)
        assert os.getsid(child) == child
    finally:
        os.kill(child, signal.SIGKILL)


def test_it_demands_a_key_and_settings_that_it_knows() -> None:
    module = [sys.executable, "-P", "-m", "deployments.simulator"]
    launch = launched()
    environment = {**os.environ, **Simulated().environment(launch)}
    wrong = [*module, "--settings", '{"slots": 0}']
    result = subprocess.run(wrong, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "settings.slots" in result.stderr
    del environment["FRONTLINE_ENGINE_KEY"]
    result = subprocess.run(module, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "FRONTLINE_ENGINE_KEY" in result.stderr


# The adapter


def test_the_key_is_not_on_the_command_line() -> None:
    assert not any(KEY in part for part in Simulated().command(launched(slots=2)))


def test_wrong_engine_args_are_named() -> None:
    with pytest.raises(SettingsError, match=r"engine_args\.dialect.*'mlc'"):
        Simulated().command(launched(dialect="mlc"))
    with pytest.raises(SettingsError, match=r"engine_args\.speed: there is no such setting"):
        Simulated().command(launched(speed=3))


class Http:
    """The ``EngineHttp`` of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        async with httpx.AsyncClient(
            base_url=self.engine.url, verify=TLS, timeout=PATIENCE_S
        ) as http:
            answer = await http.get(path, headers=HEADERS if authorized else {})
            return answer.status_code, answer.json()

    async def post_json(self, path: str, body: Any, *, authorized: bool = True) -> tuple[int, Any]:
        raise NotImplementedError

    async def post_form(self, path: str, form: Spliced) -> tuple[int, Any]:
        raise NotImplementedError


async def facts_of(engine: Engine) -> EngineFacts:
    return await Simulated().inspect(engine.launch, Http(engine))


async def test_the_dialect_is_that_of_the_running_engine(
    vllm: Engine, sglang: Engine, tensorrt_llm: Engine
) -> None:
    facts = await facts_of(vllm)
    assert (facts.version, facts.context_length) == ("simulated-1", 4096)
    assert (facts.dialect.engine, facts.dialect.simulated) == ("simulated-vllm", True)
    assert facts.dialect.priority_routes == PRIORITY_ROUTES
    assert facts.dialect.routes == frozenset(ROUTES["vllm"])
    dialect = (await facts_of(sglang)).dialect
    assert dialect.priority_values[Tier.PRIORITY] == -100
    assert Route.RESPONSES not in dialect.priority_routes
    dialect = (await facts_of(tensorrt_llm)).dialect
    assert dialect.engine == "simulated-tensorrt-llm"
    assert dialect.priority_values == {Tier.PRIORITY: 1.0, Tier.DEFAULT: 0.5, Tier.FLEX: 0.0}
    assert dialect.priority_routes == {Route.CHAT, Route.COMPLETIONS}
    assert dialect.routes == OPENAI_ROUTES
    assert "service_tier" not in dialect.accepted_fields[Route.CHAT]
    for name in (await facts_of(tensorrt_llm)).dialect.accepted_fields[Route.CHAT]:
        answer = tensorrt_llm.post(Route.CHAT, {name: CHAT.get(name)})
        assert "Extra inputs" not in answer.text, name


@pytest.mark.parametrize(
    ("engine_args", "preempts"),
    [
        ({}, True),
        ({"preemption": False}, False),
        ({"policy": "fcfs"}, False),
        ({"dialect": "sglang"}, True),
        ({"dialect": "sglang", "policy": "fcfs", "preemption": True}, False),
        ({"dialect": "tensorrt_llm"}, False),
    ],
)
async def test_it_reports_whether_it_preempts(
    spawn: Callable[..., Engine], engine_args: dict[str, Any], preempts: bool
) -> None:
    engine = await asyncio.to_thread(spawn, **engine_args)
    assert (await facts_of(engine)).dialect.preempts is preempts


def test_its_slots_change_while_it_runs(spawn: Callable[..., Engine]) -> None:
    """Requests that run stay; those that wait start as soon as there is room."""
    engine = spawn(first_token_seconds=60, slots=3)
    with ThreadPoolExecutor(6) as threads:
        for _ in range(6):
            threads.submit(engine.post, Route.CHAT, {})
        engine.wait_until(lambda seen: seen["running"] == 3 and seen["waiting"] == 3)
        engine.change(slots=1)
        seen = engine.seen()
        assert (seen["slots"], seen["running"], seen["waiting"]) == (1, 3, 3)
        engine.change(slots=5)
        engine.wait_until(lambda seen: seen["running"] == 5 and seen["waiting"] == 1)
        engine.stop()


def test_a_pool_turns_preemption_off() -> None:
    launch = replace(launched(), preemption=False)
    assert '"preemption":false' in Simulated().command(launch)[-1]


async def test_fcfs_and_high_first_engines_are_found_out(spawn: Callable[..., Engine]) -> None:
    fcfs = await facts_of(await asyncio.to_thread(spawn, policy="fcfs"))
    assert not fcfs.dialect.native_priority
    high = await facts_of(await asyncio.to_thread(spawn, dialect="sglang", low_first=False))
    assert high.dialect.priority_values[Tier.PRIORITY] == 100


async def test_another_server_is_not_taken_for_it(vllm: Engine) -> None:
    class Other(Http):
        async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
            return 404, None

    with pytest.raises(EngineContractError, match="/simulate answered 404"):
        await Simulated().inspect(vllm.launch, Other(vllm))
