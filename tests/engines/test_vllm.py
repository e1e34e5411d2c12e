"""Real vLLM on the CPU with real models, through the whole of Frontline."""

import asyncio
import json
import os
import re
import signal
from datetime import UTC, datetime

import httpx
import openai
import pytest
from playwright.sync_api import expect

from app.config.model import MOST_AUTO_SLOTS
from deployments.engines.metrics import read_metrics
from deployments.engines.registry import adapter_named
from deployments.engines.vllm import Vllm
from deployments.preflight.memory import USUAL_TOKENS
from tests.engines.limits import most_at_once
from tests.engines.lora import ADAPTER, ADAPTER_PRICES
from tests.engines.traces import Traces, check_joined
from tests.faults.clients import CUT, ask, check_bill
from tests.support.browser import DESKTOP, PHONE, chromium, run, visiting
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually_async,
)
from tests.support.waiting import PATIENCE_S, SLOWEST

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
LONG_PREFIX = "Here is a list of facts about the world that you should keep in mind. " * 10


@pytest.fixture(scope="module", autouse=True)
def removed_at_last(cluster):
    yield
    cluster.remove("smollm2", "smollm2-fcfs", "minilm")


def chat(local, model="smollm2", **request):
    request = {"messages": FRANCE, "max_tokens": 24, "temperature": 0, **request}
    raw = local.client().chat.completions.with_raw_response.create(model=model, **request)
    return raw.headers, raw.parse()


def test_a_real_model_answers_in_a_sentence(local):
    headers, answer = chat(local, service_tier="priority")
    assert "Paris" in answer.choices[0].message.content
    assert answer.service_tier == headers["x-service-tier"] == "priority"
    assert headers["x-engine"] == "vllm"


def test_costs_are_in_ratio_cached_tokens_included(local):
    messages = [{"role": "user", "content": LONG_PREFIX + "What is the capital of France?"}]
    chat(local, messages=messages)  # fills the prefix cache
    usage = {
        tier: chat(local, messages=messages, service_tier=tier)[1].usage
        for tier in ("default", "priority", "flex")
    }
    assert usage["default"].prompt_tokens_details.cached_tokens > 0
    assert (
        usage["priority"].model_copy(update={"estimated_cost": usage["default"].estimated_cost})
        == (usage["default"])
    )
    cost = {tier: usage[tier].estimated_cost for tier in usage}
    assert cost["priority"] == pytest.approx(1.5 * cost["default"], rel=1e-12)
    assert cost["flex"] == pytest.approx(0.8 * cost["default"], rel=1e-12)


def test_the_same_engine_without_its_priority_policy_serves_default(local):
    assert local.entry("smollm2-fcfs")["service_tiers"] == ["default", "flex"]
    assert "priority" in local.entry("smollm2")["metadata"]["tags"]
    for model in ("smollm2", "smollm2-fcfs"):
        chat(local, model)  # fills the prefix cache
    headers, answer = chat(local, "smollm2-fcfs", service_tier="priority")
    _, plain = chat(local, "smollm2", service_tier="default")
    assert "Paris" in answer.choices[0].message.content
    assert answer.service_tier == headers["x-service-tier"] == "default"
    assert headers["x-service-tier-reason"] == "no_replica_honours_priority"
    assert answer.usage.completion_tokens == plain.usage.completion_tokens
    assert answer.usage.estimated_cost == plain.usage.estimated_cost


def test_slots_auto_is_what_fits_into_the_running_engines_cache(local):
    [replica] = local.replicas("smollm2-fcfs")
    with local.engine("smollm2-fcfs") as engine:
        facts = engine.get("/frontline/facts").json()
    assert facts["max_num_seqs"] == MOST_AUTO_SLOTS and facts["max_model_len"] == 4096
    assert 1 < replica.slots == facts["kv_tokens"] // USUAL_TOKENS < MOST_AUTO_SLOTS


async def test_the_running_engine_is_held_to_fewer_requests(local):
    """As with `slots: auto` where fewer fit than the engine was started for."""
    [replica] = local.replicas("smollm2")
    model = local.snapshot("smollm2").id
    assert await most_at_once(Vllm(), model, replica, 2, lambda: running(local)) == (True, 2)


def test_a_stream_carries_its_tier_on_every_chunk_and_its_cost_on_the_last(local):
    request = {"model": "smollm2", "messages": FRANCE, "temperature": 0, "max_tokens": 24}
    client = local.client()
    plain = list(client.chat.completions.create(**request, stream=True, service_tier="priority"))
    options = {"include_usage": True}
    counted = list(
        client.chat.completions.create(
            **request, stream=True, stream_options=options, service_tier="priority"
        )
    )
    assert {chunk.service_tier for chunk in plain + counted} == {"priority"}
    assert all(chunk.choices for chunk in plain) and counted[-1].choices == []
    text = "".join(chunk.choices[0].delta.content or "" for chunk in plain)
    assert "Paris" in text
    assert plain[-1].choices[0].finish_reason
    assert plain[-1].usage.estimated_cost == counted[-1].usage.estimated_cost > 0
    assert not any(chunk.usage for chunk in plain[:-1] + counted[:-1])


def test_embeddings_are_real(local):
    raw = local.client().embeddings.with_raw_response.create(
        model="sentence-transformers/all-MiniLM-L6-v2",
        input=["a cat sat on the mat", "a kitten rested on a rug", "quarterly tax returns"],
        extra_body={"service_tier": "priority"},
    )
    answer = raw.parse()
    cat, kitten, tax = (item.embedding for item in answer.data)
    assert len(cat) == 384
    assert dot(cat, kitten) > 0.5 > dot(cat, tax) + 0.2
    assert answer.service_tier == raw.headers["x-service-tier"] == "priority"
    assert answer.usage.estimated_cost == pytest.approx(
        answer.usage.prompt_tokens * 0.0075e-6, rel=1e-12
    )


def test_the_pages_show_and_try_a_real_model(local, tmp_path):
    with chromium(tmp_path) as browser:
        for name, options in VISITS.items():
            with visiting(browser, local.root, **options) as visit:
                _try_in_the_playground(visit, name)


VISITS = {
    "desktop": {"viewport": DESKTOP},
    "phone": {"viewport": PHONE, "color_scheme": "dark"},
}


def _try_in_the_playground(visit, name):
    page = visit.open("/")
    chat, fcfs, embeds = (
        page.locator(".model-card", has=page.get_by_role("link", name=one, exact=True))
        for one in ("SmolLM2-135M-Instruct", "smollm2-fcfs", "all-MiniLM-L6-v2")
    )
    expect(chat.locator(".tag.priority")).to_have_text("Priority")
    expect(fcfs).to_contain_text("No running engine has native priority in force.")
    expect(embeds.locator(".tags")).to_contain_text("Embeddings")
    visit.picture(f"models-{name}")
    chat.get_by_role("link").click()
    page.route("**/v1/chat/completions", _without_chance)
    page.get_by_label("Prompt").fill("What is the capital of France?")
    page.get_by_label("Max tokens").fill("24")
    for tier in ("Default", "Priority"):
        run(page, tier)
        expect(page.locator("#answer")).to_contain_text("Paris")
        expect(page.locator("#stamp-tier")).to_have_text(tier.lower())
    expect(page.locator(".tier-card.priority .speed")).to_contain_text(
        "ms", timeout=SLOWEST * 10_000
    )
    assert visit.shifted() < 0.02 and visit.too_wide() <= 0
    visit.picture(f"model-{name}")
    page = visit.open("/models/sentence-transformers/all-MiniLM-L6-v2")
    expect(page.locator("main")).to_contain_text("embeddings, not with text")


def _without_chance(route):
    body = json.loads(route.request.post_data) | {"temperature": 0}
    route.continue_(post_data=json.dumps(body))


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_completions(local, stream):
    answer = local.client().completions.create(
        model="smollm2",
        prompt="The capital of France is",
        max_tokens=5,
        temperature=0,
        stream=stream,
        extra_body={"service_tier": "priority"},
    )
    parts = list(answer) if stream else [answer]
    assert "Paris" in "".join(part.choices[0].text for part in parts)
    assert {part.service_tier for part in parts} == {"priority"}
    assert parts[-1].usage.estimated_cost > 0


def test_responses(local):
    client = local.client()
    request = {"model": "smollm2", "input": "What is the capital of France?", "temperature": 0}
    answer = client.responses.create(**request, service_tier="priority", max_output_tokens=24)
    assert "Paris" in answer.output_text
    assert answer.service_tier == "priority" and answer.usage.estimated_cost > 0
    events = list(client.responses.create(**request, service_tier="flex", stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.service_tier == "flex"
    assert events[-1].response.usage.estimated_cost > 0


def test_structured_output_and_logprobs_and_stop_pass_through(local):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    _, answer = chat(local, response_format=shape, logprobs=True, top_logprobs=2, max_tokens=60)
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    _, answer = chat(local, stop=["Paris"])
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in answer.choices[0].message.content


def test_tools_pass_through(local):
    tool = {
        "type": "function",
        "function": {
            "name": "look_up_city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
            },
        },
    }
    choice = {"type": "function", "function": {"name": "look_up_city"}}
    request = {"tools": [tool], "tool_choice": choice, "max_tokens": 40, "seed": 1}
    _, answer = chat(local, **request)
    with local.engine("smollm2") as engine:
        model = {"model": local.snapshot("smollm2").id, "messages": FRANCE, "temperature": 0}
        direct = engine.post(
            "/v1/chat/completions", json={**request, **model}, timeout=PATIENCE_S
        ).json()
    assert said(answer) != said(chat(local, max_tokens=40)[1]), "the tool makes a difference"
    assert said(answer) == said(openai.types.chat.ChatCompletion.model_validate(direct))


def said(answer):
    message = answer.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return message.content, calls


async def test_several_choices_under_priority_do_not_harm_the_engine(local):
    # vLLM issue 29747: n > 1 under the priority policy brought an engine down.
    async with local.async_client() as client:

        async def ask(tier, stream):
            answer = await client.chat.completions.create(
                model="smollm2",
                messages=FRANCE,
                n=3,
                max_tokens=8,
                service_tier=tier,
                stream=stream,
            )
            if stream:
                return {chunk.choices[0].index async for chunk in answer if chunk.choices}
            return {choice.index for choice in answer.choices}

        tiers = ("priority", "default", "flex")
        answers = await asyncio.gather(*(ask(t, s) for t in tiers for s in (True, False)))
    assert answers == [{0, 1, 2}] * 6
    assert chat(local)[1].choices


@pytest.mark.parametrize(
    ("request_fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "word " * 6000}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": []}, None),
    ],
)
def test_the_engines_refusals_come_in_shape_and_tell_nothing_of_the_inside(
    local, request_fields, param
):
    body = {"model": "smollm2", "messages": FRANCE, **request_fields}
    answer = httpx.post(f"{local.base_url}/chat/completions", json=body, timeout=PATIENCE_S)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert not re.search(r"127\.0\.0\.1|Traceback|\.py|site-packages|/home|/usr", answer.text)


def test_a_model_without_a_route_says_so(local):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(local, "all-minilm-l6-v2")
    assert caught.value.param == "model"


def test_nothing_of_the_engine_opens_without_its_key(local):
    status = local.snapshot("smollm2").replicas[0]
    with local.engine("smollm2") as engine:
        routes = engine.get("/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/invocations", "/tokenize"} <= set(routes)
    for path, methods in routes.items():
        for method in methods:
            answer = httpx.request(method, status.base_url + path, timeout=PATIENCE_S)
            assert answer.status_code == 401, (method, path)
    sockets = [c for p in engine_processes() for c in p.net_connections("tcp") if not c.raddr]
    assert {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}


def running(local):
    return requests(local, "running")


def waiting(local):
    return requests(local, "waiting")


def requests(local, what):
    with local.engine("smollm2") as engine:
        metrics = engine.get("/metrics").text
    found = re.search(rf"^vllm:num_requests_{what}\{{.*\}} (\S+)", metrics, re.M)
    assert found, metrics
    return float(found[1])


def test_it_shows_every_metric_that_its_replicas_relay(local):
    adapter = adapter_named("vllm")
    with local.engine("smollm2") as engine:
        text = engine.get(adapter.metrics_path).text
    assert [one.metric for one in read_metrics(text, adapter.metrics)] == list(adapter.metrics)


def test_its_own_span_is_part_of_the_requests_trace(local, collector):
    server, root = check_joined(Traces(local, collector, "smollm2", "vllm"))
    assert root["name"] == "llm_request"
    told, own = server["attributes"], root["attributes"]
    assert own["gen_ai.usage.prompt_tokens"] == told["gen_ai.usage.input_tokens"]
    assert own["gen_ai.usage.completion_tokens"] == told["gen_ai.usage.output_tokens"]
    assert own["gen_ai.latency.time_to_first_token"] > 0


def test_an_adapter_is_served_by_its_own_weights_at_its_own_prices(local):
    listed = {one.id: one for one in local.client().models.list()}
    assert listed[ADAPTER].parent == local.entry("smollm2")["id"]
    _, answer = chat(local, ADAPTER, service_tier="priority")
    _, base = chat(local, "smollm2", service_tier="priority")
    assert "Paris" in base.choices[0].message.content
    assert answer.choices[0].message.content != base.choices[0].message.content
    assert (answer.model, answer.service_tier) == (ADAPTER, "priority")
    usage = answer.usage
    prices = usage.prompt_tokens * ADAPTER_PRICES["input"]
    prices += usage.completion_tokens * ADAPTER_PRICES["output"]
    assert usage.estimated_cost == pytest.approx(1.5 * prices / 10**6, rel=1e-9)


async def test_an_adapters_answers_go_on_exactly_where_they_were_suspended(local):
    """The engine keeps each request's adapter while its slot is given to another."""
    request = {"messages": FRANCE, "max_tokens": 60, "temperature": 0}
    request["extra_body"] = {"ignore_eos": True}
    alone = chat(local, ADAPTER, **request)[1].choices[0].message.content
    [replica] = local.snapshot("smollm2").replicas
    assert replica.preempts

    def asked():
        return [r for r in local.records(model=ADAPTER) if r["served_tier"] == "flex"]

    before = len(asked())
    async with local.async_client() as client:
        create = client.chat.completions.create
        flex = [
            asyncio.create_task(create(model=ADAPTER, service_tier="flex", **request))
            for _ in range(replica.slots)
        ]
        await eventually_async(lambda: running(local) == replica.slots)
        await asyncio.gather(
            *(
                create(model="smollm2", service_tier="priority", messages=FRANCE, max_tokens=8)
                for _ in range(replica.slots)
            )
        )
        answers = [answer.choices[0].message.content for answer in await asyncio.gather(*flex)]
    assert answers == [alone] * replica.slots
    records = await eventually_async(lambda: len(asked()) == before + replica.slots and asked())
    assert sum(record["preemptions"] or 0 for record in records) > 0


async def test_a_killed_engine_comes_back(local):
    """Somebody is suspended in it, and there is no other replica."""
    before = local.snapshot("smollm2").replicas[0]
    port = before.base_url.rsplit(":", 1)[1]
    old = [p for p in engine_processes() if port in command_line(p) or "VLLM" in p.name()]
    [main] = [p for p in old if port in command_line(p)]
    began_at = datetime.now(UTC).isoformat()
    async with local.async_client() as client:
        low = [asyncio.create_task(begun(client, number)) for number in range(before.slots)]
        await eventually_async(lambda: running(local) == before.slots)
        urgent = asyncio.create_task(begun(client, 1, "priority"))
        await eventually_async(lambda: waiting(local) == 1)
        os.kill(main.pid, signal.SIGKILL)
        answers = await asyncio.gather(*low, urgent)
    assert {answer.outcome for answer in answers if answer.stream} == {CUT}
    # No byte was sent yet, so the client gets a status.
    assert {one.outcome for one in answers if not one.stream} == {"503 engine_not_ready"}
    await asyncio.to_thread(check_bill, local, answers)

    def records():
        return [one for one in local.records() if one["arrived"] >= began_at]

    # One for each, whether or not its client has seen the id.
    await eventually_async(lambda: len(records()) >= len(answers))
    assert len(records()) == len(answers)
    await eventually_async(lambda: not local.snapshot("smollm2").replicas, 60)
    await asyncio.sleep(1)  # the ingress has heard of it
    with pytest.raises(openai.InternalServerError) as caught:
        chat(local)
    assert caught.value.status_code == 503
    assert float(caught.value.response.headers["retry-after"]) > 0
    local.wait_ready("smollm2", timeout_s=240)
    headers, answer = chat(local, service_tier="priority")
    assert "Paris" in answer.choices[0].message.content
    assert headers["x-service-tier"] == "priority"
    mine = local.snapshot("smollm2").replicas[0].base_url.rsplit(":", 1)[1]
    assert mine != port
    assert not main.is_running()


def begun(client, number, tier="default"):
    """Return an answer that takes long; every other request streams."""
    long = {"max_tokens": 300, "extra_body": {"ignore_eos": True}, "timeout": 300}
    request = {"model": "smollm2", "messages": FRANCE, "service_tier": tier, **long}
    return ask(client, stream=number % 2 == 0, **request)
