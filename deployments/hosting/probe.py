"""The smallest request that makes an engine generate. Pure."""

from __future__ import annotations

from typing import Any, Final

from app.core.dialect import Dialect, Route
from app.core.tiers import Tier

_TEXT: Final = "1"


def probe_request(model: str, route: Route, dialect: Dialect) -> dict[str, Any]:
    """Return the body of a request for a single token, with priority if the engine supports it.

    Where the engine preempts, it is ahead of priority, by as much as priority is ahead of default.
    The probe then takes a slot even if running priority requests have all of them.

    Args:
        model: the name that the engine serves the model under.
        route: the route that the request is for.
        dialect: the engine's request format.
    """
    prompt: Any = [{"role": "user", "content": _TEXT}] if route is Route.CHAT else _TEXT
    request = {"model": model, route.prompt_field: prompt}
    if route is Route.RESPONSES:
        request["max_output_tokens"] = 1
    elif route is not Route.EMBEDDINGS:
        request["max_tokens"] = 1
    if route in dialect.priority_routes:
        best, usual = (dialect.priority_values[tier] for tier in (Tier.PRIORITY, Tier.DEFAULT))
        request["priority"] = best + (best - usual) if dialect.preempts else best
    return request
