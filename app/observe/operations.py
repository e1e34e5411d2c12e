"""OpenTelemetry's names of what requests ask for (``gen_ai.operation.name``). Pure."""

from __future__ import annotations

from typing import Final

from app.core.dialect import Route

_OPERATIONS: Final = {
    Route.CHAT.value: "chat",
    Route.COMPLETIONS.value: "text_completion",
    Route.EMBEDDINGS.value: "embeddings",
    Route.RESPONSES.value: "chat",
    Route.MESSAGES.value: "chat",
}


def operation_of(route: str) -> str:
    """Return the operation of a route; one that OpenTelemetry does not name is called as it is."""
    return _OPERATIONS.get(route, route)
