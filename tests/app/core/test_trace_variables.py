"""The variables of traces, for ingresses and engines alike."""

import pytest

from app.core.settings import SettingsError
from app.core.trace_variables import traces_are_on, traces_endpoint

pytestmark = pytest.mark.unit

COLLECTOR, TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, "http://localhost:4318/v1/traces"),
        ({COLLECTOR: "http://collector:4318"}, "http://collector:4318/v1/traces"),
        ({COLLECTOR: "https://collector/prefix/"}, "https://collector/prefix/v1/traces"),
        ({COLLECTOR: " "}, "http://localhost:4318/v1/traces"),
        ({TRACES: "http://traces:4318/own/path"}, "http://traces:4318/own/path"),
        ({TRACES: "http://traces:4318/t", COLLECTOR: "http://collector"}, "http://traces:4318/t"),
    ],
)
def test_the_endpoint_is_what_opentelemetrys_specification_says(environment, endpoint):
    assert traces_endpoint(environment) == endpoint


def test_grpc_is_refused_only_where_traces_are_on():
    grpc = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}
    assert not traces_are_on(grpc)
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        traces_are_on({**grpc, "OTEL_TRACES_EXPORTER": "otlp"})
    assert traces_are_on({"OTEL_TRACES_EXPORTER": " OTLP "})
