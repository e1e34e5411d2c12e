import random
import time

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from app import alarms, supervision
from app.core.settings import SettingsError
from app.core.trace_context import parse_trace_context
from app.observe.observers import Context, Refused
from app.observe.tracing import sampler_of, tracing_of
from tests.support.collector import Collector
from tests.support.waiting import until

pytestmark = pytest.mark.unit

SAMPLERS = ["always_on", "always_off", "traceidratio"]
SAMPLERS += ["parentbased_" + name for name in SAMPLERS]


@pytest.fixture
def collector(monkeypatch):
    made = Collector()
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_decides_as_opentelemetrys_own(name, monkeypatch):
    environment = {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": "0.3"}
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    ours, theirs = sampler_of(environment), TracerProvider(shutdown_on_exit=False).sampler
    for _ in range(200):
        trace_id, flags = random.getrandbits(128) or 1, random.choice([None, 0, 1])
        parent, context = None, None
        if flags is not None:
            text = f"00-{trace_id:032x}-{1:016x}-{flags:02x}"
            parent = parse_trace_context({b"traceparent": text.encode()})
            span = trace.SpanContext(trace_id, 1, True, trace.TraceFlags(flags))
            context = trace.set_span_in_context(trace.NonRecordingSpan(span))
        decision = theirs.should_sample(context, trace_id, "x").decision
        assert ours.records(f"{trace_id:032x}", parent) is decision.is_sampled()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": ""},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
    ],
)
def test_traces_are_off_unless_the_exporter_is_named(environment):
    assert tracing_of(environment, "i") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ("OTEL_TRACES_SAMPLER_ARG", "half"),
    ],
)
def test_a_value_that_is_not_supported_is_named(name, value):
    environment = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "traceidratio"}
    with pytest.raises(SettingsError, match=name):
        tracing_of({**environment, name: value}, "i")


def exporting_to(collector, **more):
    tracing = tracing_of(collector.environment(**more), "i")
    assert tracing is not None
    return tracing


def refused(tracing):
    context = Context(trace=tracing.begin({}))
    tracing.refused(Refused("req_1", "embeddings", "", 401, "invalid_api_key", context=context))
    return context.trace


async def test_spans_that_no_collector_takes_are_alarmed_and_others_follow(collector, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    tracing = exporting_to(collector)
    before = alarms.PROCESS.counts().get("traces lost", 0)
    collector.status = 400
    refused(tracing)
    await until(lambda: alarms.PROCESS.counts().get("traces lost", 0) == before + 1)
    collector.status = 200
    trace_id = refused(tracing).trace_id
    await until(lambda: collector.trace(trace_id))
    tracing.close()
    [span] = collector.spans
    assert span["name"] == "POST /v1/embeddings"
    assert span["attributes"]["error.type"] == "invalid_api_key"
    assert span["resource"]["service.name"] == "frontline"
    assert span["resource"]["service.instance.id"] == "i"


def test_the_end_does_not_wait_for_a_collector_that_is_away(collector, monkeypatch):
    monkeypatch.setattr("app.observe.tracing.CLOSE_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    collector.status = 503
    tracing = exporting_to(collector)
    refused(tracing)
    time.sleep(0.3)
    before = time.monotonic()
    tracing.close()
    assert time.monotonic() - before < 20


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_SERVICE_NAME", "ours"), ("OTEL_RESOURCE_ATTRIBUTES", "service.name=ours")],
)
def test_the_service_name_may_be_set(collector, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    tracing = exporting_to(collector, **{name: value})
    refused(tracing)
    tracing.close()
    [span] = collector.spans
    assert span["resource"]["service.name"] == "ours"
