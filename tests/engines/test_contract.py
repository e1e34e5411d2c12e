"""What clients can rely on, whatever engine answers: one suite over all of them.

Through Frontline's HTTP ingress, with the real ``openai`` client and, for what it hides, plain
HTTP. What not every engine can do is a flag of the subject (``tests/engines/subjects.py``).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import wave
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import openai
import pytest

from app.core.tiers import Tier
from tests.engines.preemption_clients import Bill, of_engine, of_ingress
from tests.engines.preemption_load import Load
from tests.engines.subjects import Can, Subject
from tests.support.cluster import PLAIN, Deployment, eventually, eventually_async

pytestmark = pytest.mark.timeout(600)

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# They never end by themselves, so a test can catch them in the act.
ENDLESS = {"max_tokens": 3000, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
INSIDE = re.compile(
    r"127\.0\.0\.1|localhost|Traceback|File \"|\.py\b|site-packages|/home|/usr|/tmp|"
    r"'loc'|pydantic|tensorrt|trtllm|vllm|sglang",
    re.IGNORECASE,
)


@dataclass
class Served:
    """A subject, and the deployment that serves it."""

    subject: Subject
    deployment: Deployment

    def chat(self, **request):
        """A chat completion, the same one every time, and the headers that it came with."""
        client = self.deployment.client()
        asked = {"model": self.subject.model, "messages": FRANCE, "temperature": 0, **request}
        raw = client.chat.completions.with_raw_response.create(**{"max_tokens": 16, **asked})
        return raw.headers, raw.parse()

    def stream(self, **request):
        """The chunks of the same."""
        return list(self.chat(stream=True, **request)[1])

    def complete(self, **request):
        asked = {"model": self.subject.model, "prompt": "The capital of France is", **request}
        return self.deployment.client().completions.create(
            **{"max_tokens": 8, "temperature": 0, **asked}
        )

    def embed(self, **request):
        return self.deployment.client().embeddings.create(
            model=self.subject.embedding_model, **request
        )

    def post(self, path, **body):
        prompt = {"messages": FRANCE} if path == CHAT else {"prompt": "The capital of France is"}
        with self.deployment.http() as http:
            return http.post(path, json={"model": self.subject.model, **prompt, **body})

    def running(self):
        """How many requests the engine says it is running."""
        ask = self.subject.engine.running
        assert ask is not None
        with self.deployment.engine(self.subject.model) as engine:
            return ask(engine)

    def fail(self, **failures):
        """Let the engine fail from now on; nothing heals it."""
        with self.deployment.engine(self.subject.model) as engine:
            assert engine.post("/simulate", json={"failures": failures}).status_code == 200


@pytest.fixture
def served(subject, request):
    return Served(subject, request.getfixturevalue(subject.fixture))


@pytest.fixture
def needs(subject):
    """Skip the test where the subject cannot do what it is about."""

    def needs(*abilities):
        for ability in abilities:
            if ability not in subject.can:
                pytest.skip(f"{subject.engine.shown} does not {ability}")

    return needs


def said(chunks):
    return "".join(part.delta.content or "" for chunk in chunks for part in chunk.choices)


# Chat completions


def test_chat_has_openais_shape(served, subject):
    headers, answer = served.chat()
    assert answer.id and answer.object == "chat.completion"
    assert answer.model == served.deployment.snapshot(subject.model).id
    [choice] = answer.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content and choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 < usage.completion_tokens <= 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert headers["x-engine"] == subject.engine.shown
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_answer_is_no_longer_than_asked_for(served, name):
    answer = served.post(CHAT, **{name: 3, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_answer_at_temperature_0_is_the_same_again_and_streamed(served):
    _, once = served.chat()
    _, again = served.chat(seed=1)
    assert once.choices[0].message.content == again.choices[0].message.content
    assert said(served.stream()) == once.choices[0].message.content


def test_a_seed_makes_a_sampled_answer_the_same_again(served, needs):
    needs(Can.REPRODUCE)
    answers = [served.chat(temperature=1, seed=7)[1] for _ in range(2)]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_stop_strings_end_the_answer_and_are_not_in_it(served):
    text = served.chat()[1].choices[0].message.content
    stop = text.split()[2]
    for given in (stop, ["never said", stop]):
        choice = served.chat(stop=given)[1].choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.content == text[: text.index(stop)]
    assert said(served.stream(stop=stop)) == text[: text.index(stop)]


def test_several_choices(served):
    _, answer = served.chat(n=3, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content and choice.finish_reason for choice in answer.choices)
    chunks = served.stream(n=3, temperature=1)
    finished = [part.index for chunk in chunks for part in chunk.choices if part.finish_reason]
    assert sorted(finished) == [0, 1, 2], "each ends once"
    assert chunks[-1].usage.completion_tokens >= 3


def test_log_probabilities(served):
    _, answer = served.chat(logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) >= 2 for token in content)
    streamed = [
        token
        for chunk in served.stream(logprobs=True, top_logprobs=2)
        for part in chunk.choices
        if part.logprobs
        for token in part.logprobs.content or ()
    ]
    assert len(streamed) == len(content)


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


def test_a_function_that_is_demanded_is_called(served, needs):
    needs(Can.CALL_TOOLS)
    choice = {"type": "function", "function": {"name": "look_up"}}
    _, answer = served.chat(tools=[TOOL], tool_choice=choice, max_tokens=100)
    [call] = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "look_up")
    json.loads(call.function.arguments)
    calls = [
        call
        for chunk in served.stream(tools=[TOOL], tool_choice=choice, max_tokens=100)
        for part in chunk.choices
        for call in part.delta.tool_calls or ()
    ]
    assert {call.index for call in calls} == {0} and calls[0].function.name == "look_up"
    streamed = "".join(call.function.arguments or "" for call in calls)
    assert streamed == call_arguments(answer)


def call_arguments(answer):
    return answer.choices[0].message.tool_calls[0].function.arguments


def test_answers_follow_a_schema(served, needs):
    needs(Can.FOLLOW_SCHEMAS)
    wanted = {"name": "city", "schema": SCHEMA, "strict": True}
    shape = {"type": "json_schema", "json_schema": wanted}
    _, answer = served.chat(response_format=shape, max_tokens=60)
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}


# Streams


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streams_are_framed_as_openais(served, path):
    answer = served.post(path, stream=True, max_tokens=4)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.text.split("\n\n")
    assert end == "" and events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    kind = "chat.completion.chunk" if path == CHAT else "text_completion"
    assert {chunk["object"] for chunk in chunks} == {kind}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["choices"] for chunk in chunks), "no chunk that was not asked for"
    reasons = [chunk["choices"][0].get("finish_reason") for chunk in chunks]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    if path == CHAT:
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_is_on_the_last_chunk_with_or_without_asking(served, path):
    client = served.deployment.client()
    ask = client.chat.completions if path == CHAT else client.completions
    prompt = {"messages": FRANCE} if path == CHAT else {"prompt": "The capital of France is"}
    request = {"model": served.subject.model, "temperature": 0, "max_tokens": 5, **prompt}
    whole = ask.create(**request)
    plain = list(ask.create(**request, stream=True))
    counted = list(ask.create(**request, stream=True, stream_options={"include_usage": True}))
    assert counted[-1].choices == [] and counted[-2].choices[0].finish_reason
    for chunks in (plain, counted):
        assert not any(chunk.usage for chunk in chunks[:-1])
        usage = chunks[-1].usage
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(usage, count) == getattr(whole.usage, count), count


@pytest.mark.parametrize("failure", ["truncate", "truncate_cleanly", "error_event"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_that_breaks_ends_with_an_error_and_without_done(served, needs, path, failure):
    needs(Can.TELL)
    served.fail(request=failure, after_tokens=3)
    try:
        answer = served.post(path, stream=True, max_tokens=8)
    finally:
        served.fail()
    *events, end = answer.text.split("\n\n")
    # A connection that is reset takes with it what was not read yet.
    assert end == "" and len(events) >= 2
    error = json.loads([e for e in events if e != "data: [DONE]"][-1].removeprefix("data: "))
    assert set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["type"] == "server_error" and not INSIDE.search(str(error))
    if failure != "error_event":
        assert "data: [DONE]" not in events


# Completions, embeddings, responses


def test_completions(served):
    answer = served.complete()
    assert answer.object == "text_completion" and answer.choices[0].text
    assert (
        "".join(c.choices[0].text for c in served.complete(stream=True)) == answer.choices[0].text
    )
    prompts = ["The capital of France is", "Once upon a time"]
    batch = served.complete(prompt=prompts, n=2, temperature=1)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    with_logprobs = served.complete(logprobs=2)
    logprobs = with_logprobs.choices[0].logprobs
    assert len(logprobs.token_logprobs) == with_logprobs.usage.completion_tokens


def test_embeddings(served, needs):
    needs(Can.EMBED)
    texts = ["a cat", "a kitten", "tax returns"]
    answer = served.embed(input=texts)  # the client asks for base64 and decodes it
    assert [item.index for item in answer.data] == [0, 1, 2]
    [alone] = served.embed(input="a cat", encoding_format="float").data
    assert alone.embedding == pytest.approx(answer.data[0].embedding, abs=2e-2)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0


def test_responses(served, needs):
    needs(Can.RESPOND)
    client = served.deployment.client()
    asked = {"model": served.subject.model, "input": "What is the capital of France?"}
    answer = client.responses.create(**asked, max_output_tokens=16, service_tier="default")
    assert answer.output_text and answer.service_tier == "default"
    assert answer.usage.output_tokens > 0 < answer.usage.estimated_cost
    events = list(client.responses.create(**asked, max_output_tokens=16, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.service_tier == "default"


# What is tolerated, and what is refused


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_fields_that_an_engine_does_not_know_are_tolerated(served, path, stream):
    unknown = {
        "metadata": {"a": "b"},
        "store": False,
        "safety_identifier": "someone",
        "prompt_cache_key": "x",
        "made_up": {"by": ["us", None]},
    }
    options = {"stream_options": {"include_obfuscation": False}} if stream else {}
    answer = served.post(path, **unknown, max_tokens=2, stream=stream, **options)
    assert answer.status_code == 200, answer.text


def test_unknown_fields_of_embeddings_are_tolerated(served, needs):
    needs(Can.EMBED)
    answer = served.embed(input="x", extra_body={"made_up": 1, "service_tier": "default"})
    assert answer.data


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_null_stands_for_absent(served, path):
    names = "n temperature top_p stop seed stream stream_options user service_tier fail_fast"
    answer = served.post(path, **dict.fromkeys(names.split()), max_tokens=2)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "wrong", "param"),
    [
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"max_tokens": "many"}, "max_tokens"),
        (CHAT, {"n": "two"}, "n"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"stop": 7}, "stop"),
        (CHAT, {"stream": "yes"}, "stream"),
        (CHAT, {"stream_options": [], "stream": True}, "stream_options"),
        (CHAT, {"service_tier": "gold"}, "service_tier"),
        (CHAT, {"service_tier": 1}, "service_tier"),
        (CHAT, {"fail_fast": "soon"}, "fail_fast"),
        (CHAT, {"model": None}, "model"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (COMPLETIONS, {"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape_and_names_the_field(served, path, wrong, param):
    check_refused(served.post(path, **wrong), param)


@pytest.mark.parametrize("limit", [0, -1])
def test_an_answer_without_a_token_is_refused(served, subject, needs, limit):
    if limit == 0:
        needs(Can.REFUSE_EMPTY_ANSWERS)
    named = Can.NAME_LIMITS in subject.can
    check_refused(served.post(CHAT, max_tokens=limit), "max_tokens" if named else None)


def test_a_longer_answer_than_the_context_has_room_for(served, subject, needs):
    needs(Can.REFUSE_LONG_ANSWERS)
    named = Can.NAME_LIMITS in subject.can
    check_refused(served.post(CHAT, max_tokens=10**6), "max_tokens" if named else None)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_too_long_a_prompt(served, path):
    prompt = "word " * 6000
    messages = {"messages": [{"role": "user", "content": prompt}]}
    body = messages if path == CHAT else {"prompt": prompt}
    error = check_refused(served.post(path, **body), "messages" if path == CHAT else "prompt")
    assert error["code"] == "context_length_exceeded"


def check_refused(answer, param):
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), answer.text
    assert error["message"] and not INSIDE.search(answer.text), answer.text
    return error


def test_an_unknown_model(served):
    with pytest.raises(openai.NotFoundError) as caught:
        served.chat(model="no/such-model")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# Tiers


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
def test_the_tier_is_in_the_body_on_every_chunk_and_in_the_header(served, needs, path, tier):
    needs(Can.PRIORITIZE)
    whole = served.post(path, service_tier=tier, max_tokens=3)
    assert whole.json()["service_tier"] == whole.headers["x-service-tier"] == tier
    assert "x-service-tier-reason" not in whole.headers
    streamed = served.post(path, service_tier=tier, max_tokens=3, stream=True)
    chunks = [json.loads(e[6:]) for e in streamed.text.split("\n\n") if e.startswith("data: {")]
    assert {chunk["service_tier"] for chunk in chunks} == {streamed.headers["x-service-tier"]}
    assert chunks[-1]["service_tier"] == tier and chunks[-1]["usage"]["estimated_cost"] > 0


def test_priority_costs_one_and_a_half_times_default(served, needs):
    needs(Can.PRIORITIZE)
    served.chat()  # fills the prefix cache
    usage = {t: served.chat(service_tier=t)[1].usage for t in ("default", "priority", "flex")}
    default = usage["default"].estimated_cost
    assert usage["priority"].estimated_cost == pytest.approx(1.5 * default, rel=1e-12)
    assert usage["flex"].estimated_cost == pytest.approx(0.8 * default, rel=1e-12)


@pytest.mark.parametrize("stream", [False, True])
def test_without_native_priority_it_is_served_as_default_at_that_price(served, subject, stream):
    if Can.PRIORITIZE in subject.can:
        pytest.skip("it has native priority")
    served.chat()  # fills the prefix cache
    told = {}
    for tier in ("default", "priority"):
        answer = served.post(CHAT, service_tier=tier, max_tokens=3, stream=stream)
        assert (answer.status_code, answer.headers["x-service-tier"]) == (200, "default")
        reason = answer.headers.get("x-service-tier-reason")
        assert reason == ("no_replica_honours_priority" if tier == "priority" else None)
        events = [e[6:] for e in answer.text.split("\n\n") if e.startswith("data: {")]
        told[tier] = json.loads(events[-1] if stream else answer.text)
        assert told[tier]["service_tier"] == "default"
    costs = {tier: one["usage"]["estimated_cost"] for tier, one in told.items()}
    assert costs["priority"] == costs["default"] > 0


def test_a_clients_own_priority_never_reaches_the_engine(served):
    # It would be refused there: it is not a number.
    headers = {"X-Vllm-Priority": "first", "x-override-priority": "first"}
    _, answer = served.chat(extra_body={"priority": "first"}, extra_headers=headers)
    assert answer.service_tier == "default"


def test_the_engine_gets_its_own_value_for_the_tier(served, needs, subject):
    needs(Can.TELL, Can.PRIORITIZE)
    values = served.deployment.snapshot(subject.model).replicas[0].dialect.priority_values
    with served.deployment.engine(subject.model) as engine:
        for tier, value in values.items():
            served.chat(service_tier=tier.value, extra_body={"priority": 7})
            body = engine.get("/simulate").json()["requests"][-1]["body"]
            assert body["priority"] == value
            assert {"service_tier", "fail_fast"}.isdisjoint(body)


# Preemption


def test_the_replica_reports_whether_its_engine_preempts(served, subject):
    [replica] = served.deployment.replicas(subject.model)
    assert replica.preempts is (Can.PREEMPT in subject.can)


async def test_priority_does_not_wait_for_the_last_token_of_a_running_request(
    served, needs, subject
):
    needs(Can.PREEMPT)
    [replica] = served.deployment.replicas(subject.model)
    order = []
    began = asyncio.Queue()
    # Straight to the engine: an ingress sends no more than there are slots.
    model_id = served.deployment.snapshot(subject.model).id
    async with direct(replica, model_id) as engine:

        async def low(tier):
            answer = await engine.stream(
                tier, subject.engine.long, first=lambda: began.put_nowait(1), prompt="Once upon"
            )
            order.append("an end")
            return answer

        running = [
            asyncio.create_task(low((Tier.DEFAULT, Tier.FLEX)[number % 2]))
            for number in range(replica.slots)
        ]
        for _ in running:
            await began.get()
        urgent = await asyncio.gather(
            *(
                engine.stream(
                    Tier.PRIORITY, 4, first=lambda: order.append("priority"), prompt="Hurry"
                )
                for _ in range(2)
            )
        )
        answers = await asyncio.gather(*running)
    assert order == ["priority"] * 2 + ["an end"] * replica.slots
    assert all(answer.ended and answer.tokens == 4 for answer in urgent)
    assert all(answer.ended and answer.tokens == subject.engine.long for answer in answers)


@asynccontextmanager
async def direct(replica, model_id):
    """A client of the engine's own server."""
    headers = {"authorization": f"Bearer {replica.key}"}
    async with httpx.AsyncClient(
        base_url=replica.base_url,
        headers=headers,
        # The ingress does not know of these requests, so on SGLang priority may suspend them for as
        # long as it comes. The test's own limit bounds them.
        timeout=None,
        verify=PLAIN,
        # An engine closes a connection that is idle, perhaps just as a request is sent on it.
        limits=httpx.Limits(max_keepalive_connections=0),
    ) as engine:
        yield of_engine(engine, model_id, replica.dialect.priority_values)


PREEMPTIONS = int(os.environ.get("FRONTLINE_PREEMPTIONS", "20"))
"""How many preemptions the next test waits for; 1,000 in its long form."""


@pytest.mark.timeout(600 + 3 * PREEMPTIONS)
async def test_every_answer_is_whole_however_often_it_is_suspended(served, needs, subject):
    needs(Can.PREEMPT)
    cluster, engine = served.deployment, subject.engine
    [replica] = cluster.replicas(subject.model)
    began = datetime.now(UTC).isoformat()

    def new_records():
        return [one for one in cluster.records() if one["arrived"] >= began]

    def look(ask):
        with cluster.engine(subject.model) as http:
            return ask(http)

    async def preemptions():
        if engine.preempted is None:
            return load.suspended
        return await asyncio.to_thread(look, engine.preempted)

    async with (
        httpx.AsyncClient(base_url=cluster.root, timeout=600, verify=PLAIN) as http,
        direct(replica, cluster.snapshot(subject.model).id) as own,
    ):
        load = Load(of_ingress(http, subject.model), own, engine, replica.slots)
        count = await load.run(preemptions, PREEMPTIONS)
        worst = await load.score_again(5 + PREEMPTIONS // 50, slack=0.5)
    assert count >= PREEMPTIONS
    assert await eventually_async(lambda: look(engine.is_free)), "slots and cache are free again"
    # Each answer has one record with its tokens, and whoever left has one at the most.
    answers = sum(load.clients.billed.values())
    await eventually_async(lambda: len(_completed(new_records())) >= answers)
    records = new_records()
    assert Counter(_completed(records)) == load.clients.billed
    others = [one for one in records if one["state"] != "completed"]
    assert {one["reason"] for one in others} <= {"client_gone"}
    assert len(others) <= load.served["leaver"]
    print(
        f"\n| {subject.name} | {count:.0f} preemptions | {answers} answers | "
        f"{dict(load.served)} | priority TTFT p50 {_at(load.first_s, 0.5):.2f} s, "
        f"p99 {_at(load.first_s, 0.99):.2f} s of {len(load.first_s)} | longest pause "
        f"{load.pause_s:.1f} s | {len(load.texts)} texts, worst token {worst:.3f} |"
    )


def _completed(records):
    return [
        Bill(one["served_tier"], bool(one["stream"]), one["completion_tokens"])
        for one in records
        if one["state"] == "completed"
    ]


def _at(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


# Load and clients that leave


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_whose_client_leaves_is_aborted(served, needs, stream):
    needs(Can.COUNT)
    async with served.deployment.async_client() as client:
        task = asyncio.create_task(_endless(client, served.subject.model, stream))
        await eventually_async(lambda: served.running() == 1)
        if stream:
            await asyncio.sleep(0.5)  # in the middle of it
        task.cancel()
        await asyncio.wait([task])
        await eventually_async(lambda: served.running() == 0, served.subject.engine.abort_s)


async def _endless(client, model, stream):
    answer = await client.chat.completions.create(
        model=model,
        messages=FRANCE,
        stream=stream,
        max_tokens=ENDLESS["max_tokens"],
        extra_body={"ignore_eos": True},
    )
    async for _ in answer:
        pass


async def test_fail_fast_is_turned_away_when_there_is_no_room(served, subject):
    assert served.chat(extra_body={"fail_fast": True})[1].choices
    slots = sum(r.slots for r in served.deployment.snapshot(subject.model).replicas)

    def turned_away():
        try:
            served.chat(extra_body={"fail_fast": True}, max_tokens=1)
        except openai.RateLimitError as error:
            return error
        return None

    async with served.deployment.async_client() as client:
        tasks = [
            asyncio.create_task(_endless(client, subject.model, True)) for _ in range(slots + 1)
        ]
        error = await eventually_async(turned_away)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert (error.status_code, error.code) == (429, "engine_overloaded")
    assert int(error.response.headers["retry-after"]) >= 1
    assert error.response.headers["x-shed-reason"] == "fail_fast"
    answered = await asyncio.to_thread(eventually, lambda: not turned_away(), 20)
    assert answered, "there is room again"


async def test_many_at_once_of_every_kind_are_all_answered(served):
    async with served.deployment.async_client() as client:

        async def ask(tier, stream):
            answer = await client.chat.completions.create(
                model=served.subject.model,
                messages=FRANCE,
                n=2,
                max_tokens=4,
                service_tier=tier,
                stream=stream,
            )
            if stream:
                return {part.index async for chunk in answer for part in chunk.choices}
            return {choice.index for choice in answer.choices}

        kinds = [(t, s) for t in ("priority", "default", "flex") for s in (True, False)] * 3
        answers = await asyncio.gather(*(ask(*kind) for kind in kinds))
    assert Counter(map(frozenset, answers)) == {frozenset({0, 1}): len(kinds)}


# Rankings


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/score"])
def test_texts_are_ranked_at_their_tier(served, needs, path):
    needs(Can.RANK, Can.EMBED, Can.PRIORITIZE)
    texts = ["Bread is made of flour.", "Paris is the capital of France."]
    names = ("query", "documents") if path == "/v2/rerank" else ("text_1", "text_2")
    asked = {"model": served.subject.embedding_model, "service_tier": "priority"}
    with served.deployment.http() as http:
        answer = http.post(path, json={**asked, names[0]: texts[1], names[1]: texts})
    assert (answer.status_code, answer.headers["x-service-tier"]) == (200, "priority")
    told = answer.json()
    if path == "/v2/rerank":
        assert [one["index"] for one in told["results"]] == [1, 0]
    else:
        assert told["data"][1]["score"] > told["data"][0]["score"]
    assert told["service_tier"] == "priority" and told["usage"]["estimated_cost"] > 0
    assert told["usage"]["prompt_tokens"] >= 15 and "usage_estimated" not in told["usage"]


# Recordings


def recording(seconds):
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(int(seconds * 32_000)))
    return ("a.wav", held.getvalue())


@pytest.mark.parametrize("form", ["json", "verbose_json", "srt"])
@pytest.mark.parametrize("tier", ["priority", "flex"])
def test_recordings_are_transcribed_and_billed_by_the_second(served, needs, tier, form):
    needs(Can.TRANSCRIBE)
    # Longer than what is copied or searched at a time.
    raw = served.deployment.client().audio.transcriptions.with_raw_response.create(
        model=served.subject.model,
        file=recording(29.5),
        response_format=form,
        extra_body={"service_tier": tier},
    )
    echoed = "default" if tier == "priority" else tier
    assert raw.headers["x-service-tier"] == echoed
    if form == "srt":
        assert "00:00:00,000 --> " in raw.text
        return
    answer = raw.parse()
    assert answer.service_tier == echoed and isinstance(answer.text, str)
    assert answer.usage.seconds == 30
    assert answer.usage.estimated_cost == pytest.approx(0.03 * (0.8 if tier == "flex" else 1))


def test_a_transcript_is_streamed(served, needs):
    needs(Can.TRANSCRIBE)
    stream = served.deployment.client().audio.transcriptions.create(
        model=served.subject.model, file=recording(2), stream=True
    )
    chunks = [chunk.to_dict() for chunk in stream]
    assert {chunk["service_tier"] for chunk in chunks} == {"default"}
    assert chunks[-1]["usage"]["seconds"] == 2


def test_an_engine_that_does_not_transcribe_says_so(served, subject):
    if Can.TRANSCRIBE in subject.can:
        pytest.skip("it does")
    with pytest.raises(openai.BadRequestError) as refused:
        served.deployment.client().audio.transcriptions.create(
            model=subject.model, file=recording(1)
        )
    assert refused.value.code == "unsupported_endpoint"


# Anthropic's messages


def message(served, path="messages", **body):
    asked = {"model": served.subject.model, "messages": FRANCE, **body}
    with served.deployment.http() as http:
        return http.post(f"/anthropic/v1/{path}", json=asked)


def message_of(answer):
    """Return the message of an answer or a stream, and the usage with which a stream begins."""
    if answer.headers["content-type"] == "application/json":
        whole = answer.json()
        return whole, whole["usage"]
    data = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    start, *events, end, stop = [json.loads(one) for one in data]
    kinds = (start["type"], end["type"], stop["type"])
    assert kinds == ("message_start", "message_delta", "message_stop")
    texts = [event["delta"]["text"] for event in events if "text" in event.get("delta", ())]
    content = [{"type": "text", "text": "".join(texts)}]
    return start["message"] | {"content": content, "usage": end["usage"]}, start["message"]["usage"]


@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
@pytest.mark.parametrize("stream", [False, True])
def test_messages_have_anthropics_shape_and_their_tier(served, needs, tier, stream):
    needs(Can.MESSAGE, Can.PRIORITIZE)
    answer = message(served, service_tier=tier, stream=stream, max_tokens=8, temperature=0)
    assert (answer.status_code, answer.headers["x-service-tier"]) == (200, tier)
    assert "x-service-tier-reason" not in answer.headers
    told, at_first = message_of(answer)
    assert (told["type"], told["role"]) == ("message", "assistant")
    assert any(block["text"] for block in told["content"])
    usage = told["usage"]
    assert usage["service_tier"] == at_first["service_tier"] == tier
    assert 1 <= usage["output_tokens"] <= 8
    assert usage["input_tokens"] + usage.get("cache_read_input_tokens", 0) > 5
    assert usage["estimated_cost"] > 0 and "usage_estimated" not in usage


def test_the_tokens_of_a_message_are_counted_and_text_is_turned_into_them(served, needs):
    needs(Can.MESSAGE)
    counted = message(served, "messages/count_tokens").json()["input_tokens"]
    usage = message(served, max_tokens=1).json()["usage"]
    assert counted == usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    with served.deployment.http() as http:
        asked = {"model": served.subject.model, "prompt": "The capital of France"}
        tokens = http.post("/tokenize", json=asked).json()["tokens"]
        asked = {"model": served.subject.model, "tokens": tokens}
        assert "capital of France" in http.post("/v1/detokenize", json=asked).json()["prompt"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"max_tokens": -1}, 400),
        ({}, 400),
        ({"max_tokens": 4, "messages": [{"role": "nobody", "content": "x"}]}, 400),
        ({"max_tokens": 4, "messages": [{"role": "user", "content": "word " * 9000}]}, 400),
        ({"max_tokens": 4, "model": "no/such"}, 404),
    ],
)
def test_errors_of_messages_have_anthropics_shape_and_say_nothing_of_the_inside(
    served, needs, body, status
):
    needs(Can.MESSAGE)
    if served.subject.engine.shown.startswith("simulated") and "nobody" in str(body):
        pytest.skip("takes any role")
    answer = message(served, **body)
    told = answer.json()
    assert (answer.status_code, told["type"]) == (status, "error")
    assert told["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert not INSIDE.search(told["error"]["message"])


def test_an_engine_without_messages_says_so(served, subject):
    if Can.MESSAGE in subject.can:
        pytest.skip("it has them")
    answer = message(served, max_tokens=4)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_endpoint")
