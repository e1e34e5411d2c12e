"""``POST /v1/request-costs``: what single requests cost, by their ids.

The route and its name are DeepInfra's; ``cost`` is in USD with every digit, as on ``/v1/usage``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.core import errors
from app.gateway.cross_site import require_json
from app.gateway.handler import identify
from app.gateway.services import Services
from app.gateway.short_body import read_short_body
from app.gateway.usage_route import reading
from app.ledger.record import UsageRecord, is_stored_text
from app.ledger.record_store import Wanted
from app.ledger.usage import plain

MAX_IDS: Final = 1000
"""Most requests that can be asked for at once."""
_LONGEST: Final = 256 * 1024
_NAME: Final = "request_ids"


def add_request_costs_route(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the route. A tenant sees the requests of all its keys."""

    @api.post(f"{prefix}/request-costs")
    async def request_costs(request: Request) -> Response:
        caller = await identify(services, request.scope["headers"])
        require_json(dict(request.scope["headers"]))
        ids = parse_ids(await read_short_body(request, _LONGEST))
        assert services.usage is not None, "settings come before requests"
        with reading(services.usage.settings):
            found = await services.usage.latest(Wanted(caller.tenant, requests=ids), MAX_IDS)
        return JSONResponse({"object": "list", "data": _entries(ids, found)})


def parse_ids(body: bytes) -> tuple[str, ...]:
    """Return the request ids in a body, each once, in their order.

    Raises:
        InvalidRequest: the body is not JSON with a list of ids, or it has too many of them.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise errors.InvalidRequest("The request body is not valid JSON.") from None
    if not isinstance(fields, dict):
        raise errors.InvalidRequest("The request body must be a JSON object.")
    for name in fields:
        if name != _NAME:
            raise errors.InvalidRequest(f"Unknown parameter: '{name[:100]}'.", param=name[:100])
    ids = fields.get(_NAME)
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise errors.InvalidRequest(f"'{_NAME}' must be a list of request ids.", param=_NAME)
    if not 1 <= len(ids) <= MAX_IDS:
        raise errors.InvalidRequest(
            f"'{_NAME}' must have from 1 to {MAX_IDS} request ids (got {len(ids)}).", param=_NAME
        )
    return tuple(dict.fromkeys(ids))


def _is_id(value: object) -> bool:
    return isinstance(value, str) and is_stored_text(value)


def _entries(ids: Sequence[str], records: Sequence[UsageRecord]) -> list[dict[str, Any]]:
    by_id = {one.origin.request_id: one for one in records}
    return [{"request_id": one, **_entry(by_id.get(one))} for one in ids]


def _entry(record: UsageRecord | None) -> dict[str, Any]:
    """Return what is told of one request. Without a record it is unknown, or not settled yet."""
    if record is None:
        return {"found": False, "cost": None}
    usage = record.usage
    return {
        "found": True,
        "cost": plain(record.cost),
        "state": record.state.value,
        "model": record.origin.model,
        "requested_tier": record.origin.requested and record.origin.requested.value,
        "service_tier": record.served and record.served.value,
        "service_tier_reason": record.reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "images": usage.images,
            "audio_seconds": usage.audio_seconds,
            "estimated": record.usage_estimated,
        },
    }
