"""OpenTelemetry's names for a request: its operation and its provider. Pure."""

from __future__ import annotations

from typing import Final

from app.core.dialect import Route

PROVIDER: Final = "openai"
"""``gen_ai.provider.name`` of spans and metrics. In OpenTelemetry's conventions it names the kind
of telemetry rather than the vendor: attributes ``openai.*``, such as the service tiers, belong only
to this value, and it also stands for other services with OpenAI's API."""

_OPERATIONS: Final = {
    Route.CHAT.value: "chat",
    Route.COMPLETIONS.value: "text_completion",
    Route.EMBEDDINGS.value: "embeddings",
    Route.RESPONSES.value: "chat",
    Route.MESSAGES.value: "chat",
}


def operation_of(route: str) -> str:
    """Return ``gen_ai.operation.name`` of a route, by its path below ``/v1/``.

    A route that OpenTelemetry has no name for keeps its own.
    """
    return _OPERATIONS.get(route, route)
