"""What is SGLang's own: real SGLang on the CPU, through the whole of Frontline."""

import asyncio
import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from app.core.paths import frontline_home
from deployments.engines.metrics import read_metrics
from deployments.engines.registry import adapter_named
from deployments.engines.sglang import Sglang
from tests.engines.limits import most_at_once
from tests.engines.traces import Traces, check_joined
from tests.support.cluster import command_line, engine_processes, eventually, eventually_async
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def removed_at_last(cluster):
    yield
    cluster.remove("sglang")


def as_json(schema):
    shape = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": shape}


def chat(sglang, **request):
    request = {"messages": FRANCE, "max_tokens": 16, "temperature": 0, **request}
    raw = sglang.client().chat.completions.with_raw_response.create(model="sglang", **request)
    return raw.headers, raw.parse()


@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
def test_a_real_model_answers_in_a_sentence_at_every_tier(sglang, tier):
    headers, answer = chat(sglang, service_tier=tier)
    assert "Paris" in answer.choices[0].message.content
    assert answer.service_tier == headers["x-service-tier"] == tier
    assert headers["x-engine"] == "sglang"
    assert "x-service-tier-reason" not in headers


def test_the_scheduler_itself_says_that_priority_is_in_force(sglang):
    with sglang.engine("sglang") as engine:
        [scheduler] = engine.get("/server_info").json()["internal_states"]
    assert scheduler["enable_priority_scheduling"] is True
    assert scheduler["schedule_low_priority_values_first"] is True
    assert scheduler["default_priority_value"] == 0
    assert scheduler["retraction_policy"] == "priority"
    assert scheduler["max_running_requests"] == 4
    assert "priority" in sglang.entry("sglang")["metadata"]["tags"]


async def test_the_running_engine_is_held_to_fewer_requests(sglang):
    """As with `slots: auto` where fewer fit than the engine was started for."""
    [replica] = sglang.replicas("sglang")
    model = sglang.snapshot("sglang").id
    assert await most_at_once(Sglang(), model, replica, 2, lambda: running(sglang)) == (True, 2)


async def test_the_engine_takes_our_lowest_number_first_and_makes_room_for_it(sglang):
    status = sglang.snapshot("sglang").replicas[0]
    values = status.dialect.priority_values
    headers = {"authorization": f"Bearer {status.key}"}
    ended = []

    async def ask(engine, tier, tokens):
        body = {"model": "m", "prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
        await engine.post("/v1/completions", json={**body, "priority": values[tier]})
        ended.append(tier)

    async with httpx.AsyncClient(
        base_url=status.base_url, headers=headers, timeout=PATIENCE_S
    ) as engine:
        # Twice as many as there are slots, so that some wait.
        low = [asyncio.create_task(ask(engine, "flex", 48)) for _ in range(8)]
        await eventually_async(lambda: running(sglang) == 4)
        await asyncio.gather(ask(engine, "default", 4), ask(engine, "priority", 4))
        # It may make room for both at once.
        assert sorted(ended) == ["default", "priority"], "they wait for none of the eight"
        await asyncio.gather(*low)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_served_as_default_because_the_route_drops_priority(sglang, stream):
    raw = sglang.client().responses.with_raw_response.create(
        model="sglang",
        input="What is the capital of France?",
        temperature=0,
        max_output_tokens=16,
        service_tier="priority",
        stream=stream,
    )
    answer = list(raw.parse())[-1].response if stream else raw.parse()
    assert "Paris" in answer.output_text
    assert answer.service_tier == raw.headers["x-service-tier"] == "default"
    assert raw.headers["x-service-tier-reason"] == "route_does_not_honour_priority"


def test_a_stream_carries_its_tier_and_what_came_from_the_cache(sglang):
    messages = [{"role": "user", "content": "Keep this in mind. " * 20 + "Say hello."}]
    chat(sglang, messages=messages)  # fills the prefix cache
    options = {"include_usage": True}
    _, chunks = chat(
        sglang, messages=messages, stream=True, stream_options=options, service_tier="priority"
    )
    chunks = list(chunks)
    assert {chunk.service_tier for chunk in chunks} == {"priority"}
    assert not any(chunk.usage for chunk in chunks[:-1]) and chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens / 2
    assert usage.estimated_cost > 0


def test_several_choices_stop_and_logprobs_and_schemas(sglang):
    _, answer = chat(sglang, n=2, logprobs=True, top_logprobs=2, stop=["Paris"])
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert "Paris" not in answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    _, answer = chat(sglang, response_format=as_json(CITY), max_tokens=60)
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}


@pytest.mark.parametrize(
    "request_fields",
    [
        {"messages": [{"role": "user", "content": "word " * 6000}]},
        {"messages": "hello"},
        {"temperature": -1},
        {"messages": []},
        {"response_format": as_json({"type": "nonsense"})},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_come_in_shape_whatever_the_engine_makes_of_them(sglang, request_fields, stream):
    body = {"model": "sglang", "messages": FRANCE, "stream": stream, **request_fields}
    answer = httpx.post(f"{sglang.base_url}/chat/completions", json=body, timeout=PATIENCE_S)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert not re.search(r"127\.0\.0\.1|Traceback|\.py|site-packages|/home|/usr", answer.text)


def test_an_error_that_the_engine_puts_into_a_stream_becomes_a_status(sglang):
    bad = {"messages": FRANCE, "stream": True, "response_format": as_json({"type": "nonsense"})}
    with sglang.engine("sglang") as engine:
        direct = engine.post("/v1/chat/completions", json={"model": "m", **bad})
    assert direct.status_code == 200 and direct.text.startswith('data: {"error"'), "it is needed"
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        chat(sglang, **{key: bad[key] for key in ("stream", "response_format")})


def test_it_shows_every_metric_that_its_replicas_relay(sglang):
    chat(sglang)
    adapter = adapter_named("sglang")

    def shown():
        with sglang.engine("sglang") as engine:
            text = engine.get(adapter.metrics_path).text
        return [one.metric.name for one in read_metrics(text, adapter.metrics)]

    # Its processes write them down now and then.
    eventually(lambda: shown() == [one.name for one in adapter.metrics], 20, "not all of them")


def test_its_own_spans_are_part_of_the_requests_trace(sglang, collector):
    server, root = check_joined(Traces(sglang, collector, "sglang", "sglang"))
    assert root["name"].strip().startswith("Req ")
    told, own = server["attributes"], root["attributes"]
    assert own["gen_ai.usage.prompt_tokens"] == told["gen_ai.usage.input_tokens"]
    assert own["gen_ai.usage.cached_tokens"] == told["gen_ai.usage.cache_read.input_tokens"]
    assert own["gen_ai.usage.completion_tokens"] == told["gen_ai.usage.output_tokens"]
    names = Counter(span["name"] for span in collector.spans)
    assert {"prefill_waiting", "prefill_forward", "decode_forward"} <= names.keys()
    assert set(names.values()) == {1}, "none for each token"


def running(sglang):
    with sglang.engine("sglang") as engine:
        [load] = engine.get("/v1/loads").json()["loads"]
    return load["num_running_reqs"]


def test_nothing_of_the_engine_opens_without_its_key(sglang):
    status = sglang.snapshot("sglang").replicas[0]
    with sglang.engine("sglang") as engine:
        routes = engine.get("/openapi.json").json()["paths"]
        assert engine.get("/metrics").status_code == 200
    assert {"/v1/chat/completions", "/generate", "/flush_cache", "/server_info"} <= set(routes)
    # Those that SGLang's own key leaves open.
    routes |= {"/metrics": ["get"], "/metrics/x": ["get"], "/ready": ["get", "options"]}
    with httpx.Client(base_url=status.base_url, timeout=PATIENCE_S) as stranger:
        for path, methods in routes.items():
            for method in methods:
                assert stranger.request(method, path).status_code == 401, (method, path)


def test_the_engine_is_reached_from_this_machine_alone_and_its_key_is_told_to_nobody(sglang):
    status = sglang.snapshot("sglang").replicas[0]
    processes = processes_of(status)
    assert len(processes) >= 3
    sockets = [c for p in processes for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert sockets and {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}
    assert not [p for p in processes if status.key in " ".join(command_line(p))]
    log = max(Path(frontline_home(), "logs").glob("test-sglang.sglang-*"), key=lambda p: p.name)
    assert "sglang" in log.read_text() and status.key not in log.read_text()


def processes_of(status):
    """The engine's processes: the main one, which names the port, and all below it."""
    port = status.base_url.rsplit(":", 1)[1]
    [main] = [p for p in engine_processes() if port in command_line(p)]
    return [main, *main.children(recursive=True)]


def test_an_idle_engine_rests(sglang):
    [scheduler] = named(processes_of(sglang.snapshot("sglang").replicas[0]), "scheduler")
    time.sleep(1)
    scheduler.cpu_percent()
    time.sleep(2)
    assert scheduler.cpu_percent() < 50


def named(processes, part):
    return [p for p in processes if part in p.name() or part in " ".join(command_line(p))]


def test_an_engine_that_lost_its_scheduler_is_replaced(sglang):
    before = sglang.snapshot("sglang").replicas[0]
    old = processes_of(before)
    [scheduler] = named(old, "scheduler")
    with ThreadPoolExecutor(1) as aside:
        # It has begun, and there is no other replica to move it to.
        long = {"max_tokens": 60, "extra_body": {"ignore_eos": True}, "timeout": 300}
        lost = aside.submit(lambda: chat(sglang, service_tier="priority", **long))
        eventually(lambda: running(sglang) == 1)
        scheduler.kill()
        # Six seconds of SGLang's own diagnosis, then its end.
        eventually(lambda: not any(map(alive, old)), 30, "processes are left")
        refused = lost.exception(60)
    assert isinstance(refused, openai.InternalServerError) and refused.status_code == 503
    # The models list may name the lost one for a moment more; a client would wait for the next.
    after = eventually(lambda: replaced(sglang, before), 240, "no other replica came")
    sglang.wait_ready("sglang")
    assert chat(sglang, service_tier="priority")[0]["x-service-tier"] == "priority"
    assert [r.replica_id for r in sglang.replicas("sglang")] == [after.replica_id]


def replaced(sglang, before):
    """The replica that came after another, once it serves."""
    others = (r for r in sglang.replicas("sglang") if r.replica_id != before.replica_id)
    return next(others, None)


def test_an_engine_that_lost_its_main_process_leaves_none(sglang):
    old = processes_of(sglang.snapshot("sglang").replicas[0])
    old[0].kill()
    eventually(lambda: not any(map(alive, old)), 10, "processes are left")
    eventually(lambda: not sglang.snapshot("sglang").replicas, 30)


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
