"""``GET /v1/usage``: what the caller has used, in totals."""

from __future__ import annotations

import asyncio
from datetime import date

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app import errors
from app.exchange import identify
from app.passage import Services
from app.store.database import StoreAway
from app.store.records import Wanted
from app.usage import Grouping, usage_object

_DEFAULT_GROUPS = (Grouping.DAY, Grouping.MODEL, Grouping.TIER)
# What a tenant may split by: its own name would be the same everywhere.
_GROUPS = tuple(one for one in Grouping if one is not Grouping.TENANT)
_PARAMETERS = frozenset({"start", "end", "group_by"})


def add_usage_route(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the route. A tenant sees its own usage, whichever of its keys it was."""

    @api.get(f"{prefix}/usage")
    async def usage(request: Request) -> Response:
        caller = await identify(services, dict(request.scope["headers"]))
        query = request.query_params
        for name in query:
            if name not in _PARAMETERS:
                raise errors.InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        wanted = Wanted(
            tenant=caller.tenant, since=_day(query.get("start"), "start"),
            until=_day(query.get("end"), "end"),
        )  # fmt: skip
        groups = _groups(query.get("group_by"))
        assert services.usage is not None, "settings come before requests"
        try:
            totals = await asyncio.to_thread(services.usage.totals, wanted, groups)
        except StoreAway:
            raise errors.Unavailable(
                "Usage cannot be read at the moment. What is used meanwhile is recorded.",
                "ledger_unavailable",
                5.0,
            ) from None
        return JSONResponse(usage_object(totals))


def _day(text: str | None, name: str) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise errors.InvalidRequest(
            f"Invalid '{name}': expected a day such as 2026-11-22.", param=name
        ) from None


def _groups(text: str | None) -> list[Grouping]:
    if text is None:
        return list(_DEFAULT_GROUPS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in _GROUPS]:
        raise errors.InvalidRequest(
            f"Invalid 'group_by': '{unknown[0]}' is none of {', '.join(_GROUPS)}.",
            param="group_by",
        )
    return [Grouping(name) for name in dict.fromkeys(names)]
