"""A request's trace, from its client over the ingress to the engine, over HTTP."""

import asyncio
from contextlib import asynccontextmanager

import aiohttp
import pytest
import uvicorn

from app.config.model import ModelSettings
from app.core.dialect import AUDIO_ROUTES, POOLED_ROUTES, Route
from app.observe.request_trace import pass_on
from app.observe.tracing import tracing_of
from deployments.simulator.__main__ import Server
from deployments.simulator.settings import InjectedFailures
from tests.support.collector import Collector
from tests.support.waiting import until
from tests.support.world import ALIAS, MODEL, World

pytestmark = pytest.mark.unit

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
STATE = "congo=t61rcWkgMzE"
SERVER, INTERNAL, CLIENT = 2, 1, 3
CHAT = {
    "model": ALIAS,
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 4,
    "service_tier": "priority",
}


class Traced:
    """An ingress that listens, its engines, and the collector of its spans."""

    def __init__(self, world, collector, url):
        self.world, self.collector, self.url = world, collector, url
        self.tracing = []

    def trace(self, **variables):
        tracing = tracing_of(self.collector.environment(**variables), "i1")
        assert tracing is not None
        self.tracing.append(tracing)
        self.world.services.begin_trace = tracing.begin
        self.world.services.observers.add(tracing)

    async def post(self, fields=CHAT, route=Route.CHAT, **headers):
        """Send a request; return the status and the headers that the engines received."""
        seen = [engine.observations for engine in self.world.engines.values()]
        for one in seen:
            one.forget()
        authorization = {"authorization": f"Bearer {self.world.key('plain')}"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"{self.url}{route.path}", json=fields, headers=authorization | headers
            ) as answer,
        ):
            await answer.read()
        return answer.status, [heard["headers"] for one in seen for heard in one.report()]

    async def spans(self, count):
        await until(lambda: len(self.collector.spans) >= count)
        return {span["name"]: span for span in self.collector.spans}

    async def flush(self):
        while self.tracing:
            await asyncio.to_thread(self.tracing.pop().close)


@asynccontextmanager
async def listening(app):
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, loop="none", lifespan="off", log_config=None,
        log_level="critical", access_log=False, ws="none", interface="asgi3",
    )  # fmt: skip
    server = Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def traced(tmp_path, monkeypatch):
    collector = Collector()
    for name, value in collector.environment().items():
        monkeypatch.setenv(name, value)
    world = World(tmp_path, timeout_s=30)
    await world.start()
    await world.set(ModelSettings.load({"rate_card": {"input": 1, "output": 2}}, "x"), ["vllm"])

    async with listening(world.front) as url:
        made = Traced(world, collector, url)
        yield made
    await made.flush()
    await world.close()
    collector.close()


async def test_the_spans_of_a_request_join_its_clients_trace_with_its_engines(traced):
    traced.trace()
    status, [heard] = await traced.post(traceparent=SAMPLED, tracestate=STATE)
    spans = await traced.spans(3)
    server, queue = spans["POST /v1/chat/completions"], spans["queue"]
    engine = spans[f"chat {MODEL}"]
    assert status == 200
    assert {span["trace_id"] for span in spans.values()} == {TRACE}
    assert {span["state"] for span in spans.values()} == {STATE}
    assert (server["parent_id"], queue["parent_id"]) == (SPAN, server["span_id"])
    assert engine["parent_id"] == server["span_id"]
    assert heard["traceparent"] == f"00-{TRACE}-{engine['span_id']}-01"
    assert heard["tracestate"] == STATE
    assert [one["kind"] for one in (server, queue, engine)] == [SERVER, INTERNAL, CLIENT]
    assert server["began"] <= queue["began"] <= queue["ended"] <= engine["began"]
    assert engine["began"] < engine["ended"] <= server["ended"]
    [record] = (await traced.world.new_records()).values()
    told = server["attributes"]
    assert told["gen_ai.operation.name"] == "chat"
    assert (told["gen_ai.request.model"], told["http.response.status_code"]) == (MODEL, 200)
    assert told["openai.request.service_tier"] == told["openai.response.service_tier"] == "priority"
    assert told["gen_ai.usage.input_tokens"] == record["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == record["completion_tokens"] == 4
    assert told["frontline.cost_usd"] == pytest.approx(float(record["cost"]))
    assert told["frontline.request_id"] == record["request_id"]
    assert engine["attributes"]["frontline.replica"] == record["replica"]
    assert not any("hello" in str(span) for span in traced.collector.spans)


# The engine here has no others.
@pytest.mark.parametrize("route", sorted(set(Route) - POOLED_ROUTES - AUDIO_ROUTES))
async def test_every_route_has_its_spans_answered_or_not(traced, route):
    traced.trace()
    prompt = {"messages": CHAT["messages"], "tokens": [0]}.get(route.prompt_field, "hello")
    refused, _ = await traced.post({**CHAT, "model": "no/such"}, route, traceparent=SAMPLED)
    status, _ = await traced.post({**CHAT, route.prompt_field: prompt}, route, traceparent=SAMPLED)
    # The simulated engines here make no embeddings.
    assert (refused, status) == (404, 400 if route is Route.EMBEDDINGS else 200)
    spans = await traced.spans(3)
    operation = spans[f"POST {route.path}"]["attributes"]["gen_ai.operation.name"]
    assert f"{operation} {MODEL}" in spans
    # OpenTelemetry's names, or the route's.
    assert operation in {"chat", "text_completion", "embeddings", route.value}
    # As in metrics: attributes `openai.*` belong to no other provider.
    told = [spans[name]["attributes"] for name in (f"POST {route.path}", f"{operation} {MODEL}")]
    assert [one["gen_ai.provider.name"] for one in told] == ["openai", "openai"]


async def test_a_trace_begins_here_without_a_parent_or_with_a_bad_one(traced):
    traced.trace()
    bad = ["", "nonsense", SAMPLED.upper(), f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01"]
    for number, parent in enumerate(bad, 1):
        given = {"traceparent": parent, "tracestate": STATE} if parent else {}
        _, [heard] = await traced.post(**given)
        await traced.spans(3 * number)
        trace_id = heard["traceparent"][3:35]
        spans = traced.collector.trace(trace_id)
        assert (trace_id != TRACE, len(spans)) == (True, 3)
        assert spans["POST /v1/chat/completions"]["parent_id"] == ""
        assert "tracestate" not in heard


@pytest.mark.parametrize("on", [True, False])
async def test_a_trace_that_is_not_sampled_is_passed_on_unchanged(traced, on):
    if on:
        traced.trace()
    _, [heard] = await traced.post(traceparent=UNSAMPLED, tracestate=STATE, baggage="a=1")
    assert (heard["traceparent"], heard["tracestate"]) == (UNSAMPLED, STATE)
    assert "baggage" not in heard
    await traced.flush()
    assert traced.collector.spans == []


async def test_an_engine_hears_that_a_trace_of_our_own_is_not_sampled(traced):
    traced.trace(OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0")
    _, [heard] = await traced.post()
    assert heard["traceparent"].endswith("-00")
    traced.trace(OTEL_TRACES_SAMPLER="always_off")
    _, [heard] = await traced.post(traceparent=SAMPLED)
    assert heard["traceparent"].startswith(f"00-{TRACE}-")
    assert heard["traceparent"].endswith("-00") and SPAN not in heard["traceparent"]


async def test_off_a_clients_trace_reaches_the_engine_and_nothing_else_does(traced):
    assert traced.world.services.begin_trace is pass_on
    _, [heard] = await traced.post(traceparent=SAMPLED, tracestate="not valid")
    assert heard["traceparent"] == SAMPLED and "tracestate" not in heard
    _, [heard] = await traced.post(traceparent="nonsense", tracestate=STATE)
    assert "traceparent" not in heard and "tracestate" not in heard


async def test_a_request_that_moves_to_another_engine_has_a_span_for_each(traced, monkeypatch):
    traced.trace()
    await traced.world.set(ModelSettings(), ["vllm", "sglang"])
    plans = iter([InjectedFailures(request="error")])
    monkeypatch.setattr(
        "tests.support.world.PlannedEngine.failure_of", lambda *_: next(plans, None)
    )
    status, heard = await traced.post(traceparent=SAMPLED)
    assert status == 200
    await traced.spans(5)
    calls = [span for span in traced.collector.spans if span["kind"] == CLIENT]
    assert [span["status"] for span in calls] == [2, 0]
    assert calls[0]["attributes"]["error.type"] == "EngineFailed"
    assert {one["traceparent"][36:52] for one in heard} == {span["span_id"] for span in calls}
    assert len({span["attributes"]["frontline.replica"] for span in calls}) == 2
    assert calls[0]["ended"] <= calls[1]["began"]


async def test_a_request_that_is_refused_has_a_span(traced):
    traced.trace()
    status, heard = await traced.post({**CHAT, "model": "nothing"}, traceparent=SAMPLED)
    [span] = (await traced.spans(1)).values()
    assert (status, heard, span["parent_id"], span["status"]) == (404, [], SPAN, 0)
    assert span["attributes"]["error.type"] == "model_not_found"
