"""OpenTelemetry's standard environment variables for traces, as ingresses and engines read them.

Pure: the variables are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from app.core.settings import Problem, SettingsError

OTLP: Final = "otlp"
HTTP: Final = "http/protobuf"
PROTOCOL: Final = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_PROTOCOLS: Final = (PROTOCOL, "OTEL_EXPORTER_OTLP_PROTOCOL")
_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_COLLECTOR: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
_DEFAULT_COLLECTOR: Final = "http://localhost:4318"
_PATH: Final = "/v1/traces"


def traces_are_on(environment: Mapping[str, str]) -> bool:
    """Return whether the variables ask for traces: ``OTEL_TRACES_EXPORTER=otlp``.

    Raises:
        SettingsError: a variable has a value that is not supported.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = one_of(environment, "OTEL_TRACES_EXPORTER", ("none", OTLP), "none")
    if exporter == OTLP:
        for protocol in _PROTOCOLS:
            one_of(environment, protocol, (HTTP,), HTTP)
    return exporter == OTLP


def traces_endpoint(environment: Mapping[str, str]) -> str:
    """Return the URL that spans are sent to, by OpenTelemetry's rules for OTLP over HTTP."""
    if endpoint := environment.get(_ENDPOINT, "").strip():
        return endpoint
    collector = environment.get(_COLLECTOR, "").strip() or _DEFAULT_COLLECTOR
    return collector.removesuffix("/") + _PATH


def one_of(
    environment: Mapping[str, str], name: str, accepted: tuple[str, ...], default: str
) -> str:
    """Return the value of a variable in lower case; the default if it is empty or not set.

    Raises:
        SettingsError: the value is not one of ``accepted``.
    """
    value = environment.get(name, "").strip().lower() or default
    if value not in accepted:
        raise SettingsError(
            Problem((name,), f"expected one of {', '.join(accepted)} (got {value!r})")
        )
    return value
