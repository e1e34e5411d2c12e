"""Engines send their own spans where the variables of their environment say so."""

from dataclasses import replace

import pytest

from app.config.model import PoolSettings
from app.contracts.findings import Examination
from app.core.settings import SettingsError
from deployments.engines.base import NodeSpan
from deployments.engines.registry import adapter_named
from deployments.hosting import launch
from deployments.hosting.launch import plan_launch
from deployments.model import build

pytestmark = pytest.mark.unit

URL = "http://collector:4318/v1/traces"
ON = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
ENGINES = ["vllm", "sglang"]


def started(engine, environment=None, span=NodeSpan(), **engine_args):  # noqa: B008 - frozen
    """Return an engine's command, and the variables that it gets."""
    pool = PoolSettings(
        name="p", engine=engine, model="m", engine_args=engine_args, environment=environment or {}
    )
    made = launch.make_launch("m", pool, host="127.0.0.1", port=1, span=span)
    adapter = adapter_named(engine)
    return adapter.command(made), launch.environment(adapter, made, pool)


def endpoint(command):
    at = command.index("--otlp-traces-endpoint") if "--otlp-traces-endpoint" in command else None
    return None if at is None else command[at + 1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("inherited", [True, False])
def test_the_variables_that_switch_ingresses_on_switch_engines_on(engine, inherited, monkeypatch):
    """993932d needed the same endpoint again in `engine_args`, in each engine's own words."""
    for name, value in ON.items() if inherited else ():
        monkeypatch.setenv(name, value)
    command, variables = started(engine, {} if inherited else ON)
    assert endpoint(command) == URL
    assert ("--enable-trace" in command) == (engine == "sglang")
    assert variables["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert variables["OTEL_SERVICE_NAME"] == engine
    assert variables.get("SGLANG_TRACE_LEVEL") == ("2" if engine == "sglang" else None)
    # The ingress decides what is recorded: Frontline's own requests are not.
    assert variables["OTEL_TRACES_SAMPLER"] == "parentbased_always_off"


@pytest.mark.parametrize("engine", ENGINES)
def test_off_there_is_nothing_about_spans(engine, monkeypatch):
    for variables in ({}, ON):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        command, given = started(engine, {"OTEL_TRACES_EXPORTER": "none"} if variables else {})
        assert not [word for word in (*command, *given) if "otlp" in word.lower()]
        assert not {"OTEL_SERVICE_NAME", "OTEL_TRACES_SAMPLER"} & given.keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_operator_sets_stands(engine):
    grpc = {**ON, "OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    command, variables = started(engine, grpc, otlp_traces_endpoint="other:4317")
    assert endpoint(command) == "other:4317"
    assert variables["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "grpc"
    command, variables = started(engine, ON, otlp_traces_endpoint="http://other/v1/traces")
    assert endpoint(command) == "http://other/v1/traces"
    assert "OTEL_SERVICE_NAME" not in variables
    _, variables = started(engine, {**ON, "OTEL_SERVICE_NAME": "ours"})
    assert variables["OTEL_SERVICE_NAME"] == "ours"


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_part_of_an_engine_that_answers_requests_sends_spans(engine):
    first = NodeSpan(nodes=2, rank=0, here="10.0.0.1", address="10.0.0.1", port=1)
    assert endpoint(started(engine, ON, first)[0]) == URL
    assert endpoint(started(engine, ON, replace(first, rank=1))[0]) is None


def test_an_engine_that_cannot_send_spans_is_started_without_them():
    pool = PoolSettings(name="p", engine="vllm", model="m", environment=ON)
    made = launch.make_launch("m", pool, host="127.0.0.1", port=1)
    assert launch.fitted(made, Examination((), exports_spans=True)) == made
    assert launch.fitted(made, Examination(())) == replace(made, traces="")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_shows_it(engine):
    pool = PoolSettings(name="p", engine=engine, model="m", environment=ON)
    assert endpoint(list(plan_launch("m", pool).command)) == URL


def test_a_value_that_is_not_supported_is_named_and_no_secret_beside_it_is_shown():
    environment = {**ON, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "HF_TOKEN": "hf_secret"}
    with pytest.raises(SettingsError) as caught:
        build({"id": "m", "pools": [
            {"name": "p", "engine": "vllm", "model": "m", "environment": environment}
        ]})  # fmt: skip
    assert str(caught.value) == (
        "args.pools.0.environment: OTEL_EXPORTER_OTLP_PROTOCOL: "
        "expected one of http/protobuf (got 'grpc')"
    )
