"""How engines send their own spans, and join the traces of Frontline's ingresses. Pure."""

from __future__ import annotations

from typing import Final

from app.core.trace_variables import HTTP, PROTOCOL
from deployments.engines.base import Launch

ENDPOINT: Final = "otlp_traces_endpoint"
"""The engine argument that names the collector of spans; vLLM and SGLang call it alike."""


def sends_spans(launch: Launch) -> bool:
    """Return whether Frontline lets an engine send spans.

    Where the operator has set the collector among the engine's arguments, Frontline sets nothing.
    """
    return bool(launch.traces) and ENDPOINT not in launch.engine_args


def trace_variables(launch: Launch, service: str) -> dict[str, str]:
    """Return the environment variables with which an engine sends spans; none if it sends none.

    Args:
        launch: how the engine is started.
        service: the name of the service that the spans belong to.
    """
    if not sends_spans(launch):
        return {}
    return {
        # Both engines speak gRPC by default, and ingresses HTTP.
        PROTOCOL: HTTP,
        "OTEL_SERVICE_NAME": service,
        # The ingress has decided which requests are recorded. What has no parent is the engine's
        # start, and Frontline's own requests to it.
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
