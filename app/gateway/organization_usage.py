"""OpenAI's usage API for administrators: usage and costs of all tenants, in buckets of time.

``GET /v1/organization/usage/completions``, ``…/embeddings``, ``…/audio_transcriptions`` and
``…/costs``. A tenant is
OpenAI's project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response

from app.core import errors
from app.core.dialect import AUDIO_ROUTES, Route
from app.gateway.handler import identify, require_admin
from app.gateway.services import Services
from app.gateway.usage_query import UsageQuery
from app.gateway.usage_reader import UsageReader
from app.gateway.usage_route import reading
from app.ledger.line_items import LineItem, line_items
from app.ledger.record import now_utc
from app.ledger.record_store import Wanted
from app.ledger.time_buckets import Page, Width, border_of, cursor_of, page_of, start_of
from app.ledger.usage import Grouping, Total, plain

_GROUPS: Final = {
    "project_id": Grouping.TENANT,
    "api_key_id": Grouping.KEY,
    "model": Grouping.MODEL,
    "service_tier": Grouping.TIER,
}
"""OpenAI's names of groupings."""
_CONSTANTS: Final[dict[str, Any]] = {"user_id": None, "batch": False, "api_source": "unlabeled"}
"""Groupings by which all requests are one group, and what is said of it. Keys have no users, and
there are no batches."""
_LINE_ITEM: Final = "line_item"
_FEWER: Final = "fewer buckets ('limit')"


_Row = tuple[Mapping[str, str | None], Mapping[str, Any]]
"""The values of a group, by grouping, and the fields of its result."""


@dataclass(frozen=True, slots=True)
class _Report:
    """One of the routes.

    Attributes:
        object: the ``object`` of a result.
        groups: the groupings that it offers.
        limits: the default and the maximum number of buckets, by width.
        filters: the parameters that take lists of values.
        routes: the routes whose requests it is about; ``None`` for all.
        amounts: returns the fields of a result other than its groups.
    """

    object: str
    groups: tuple[str, ...]
    limits: Mapping[Width, tuple[int, int]]
    filters: tuple[str, ...]
    routes: tuple[str, ...] | None
    amounts: Callable[[Total], dict[str, Any]]

    @property
    def has_batches(self) -> bool:
        """Whether it can be restricted to batches, or to other requests."""
        return "batch" in self.groups


def _tokens(total: Total) -> dict[str, Any]:
    return {
        "input_tokens": total.prompt_tokens,
        "output_tokens": total.completion_tokens,
        "input_cached_tokens": total.cached_tokens,
        "input_cache_write_tokens": total.cache_write_tokens,
        "num_model_requests": total.requests,
    }


def _input(total: Total) -> dict[str, Any]:
    return {"input_tokens": total.prompt_tokens, "num_model_requests": total.requests}


def _seconds(total: Total) -> dict[str, Any]:
    return {"seconds": total.audio_seconds, "num_model_requests": total.requests}


def _cost(total: Total) -> dict[str, Any]:
    return {"amount": _amount(total.cost), "quantity": None, "quantity_unit": None}


def _item(item: LineItem) -> dict[str, Any]:
    return {
        "amount": _amount(item.cost),
        "line_item": item.name,
        "quantity": item.quantity,
        "quantity_unit": item.unit,
    }


def _amount(cost: Decimal) -> dict[str, Any]:
    # A number with every digit, which a float would lose.
    return {"value": orjson.Fragment(plain(cost).encode()), "currency": "usd"}


_GENERATING: Final = frozenset(route for route in Route if route.generates)
_LIMITS: Final = {Width.MINUTE: (60, 1440), Width.HOUR: (24, 168), Width.DAY: (7, 31)}
_FILTERS: Final = ("project_ids", "api_key_ids", "models")
_REPORTS: Final = {
    "usage/completions": _Report(
        "organization.usage.completions.result",
        ("project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"),
        _LIMITS, _FILTERS, tuple(sorted(_GENERATING)), _tokens,
    ),
    "usage/embeddings": _Report(
        "organization.usage.embeddings.result", ("project_id", "user_id", "api_key_id", "model"),
        _LIMITS, _FILTERS, tuple(sorted(frozenset(Route) - _GENERATING - AUDIO_ROUTES)), _input,
    ),
    "usage/audio_transcriptions": _Report(
        "organization.usage.audio_transcriptions.result",
        ("project_id", "user_id", "api_key_id", "model"),
        _LIMITS, _FILTERS, tuple(AUDIO_ROUTES), _seconds,
    ),
    "costs": _Report(
        "organization.costs.result",
        ("project_id", "user_id", _LINE_ITEM, "api_key_id", "api_source"),
        {Width.DAY: (7, 180)}, ("project_ids", "api_key_ids"), None, _cost,
    ),
}  # fmt: skip


def add_organization_routes(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the routes. Where keys are required, they need an admin key."""

    def add(path: str, report: _Report) -> None:
        @api.get(f"{prefix}/organization/{path}")
        async def answer(request: Request) -> Response:
            caller = await identify(services, request.scope["headers"])
            require_admin(services, caller, "What is asked for shows the traffic of all tenants.")
            assert services.usage is not None, "settings come before requests"
            query = UsageQuery(request.query_params.multi_items())
            return await _answer(report, query, services.usage, int(now_utc().timestamp()))

    for path, report in _REPORTS.items():
        add(path, report)


async def _answer(report: _Report, query: UsageQuery, usage: UsageReader, now: int) -> Response:
    names = query.words("group_by", report.groups)
    width = Width(query.word("bucket_width", list(report.limits)) or Width.DAY)
    page = _page(report, query, width, usage.settings.max_days, now)
    lists = {name: query.texts(name) for name in report.filters}
    only_batches = query.boolean("batch") if report.has_batches else None
    query.refuse_others()
    results: dict[int, list[dict[str, Any]]] = {}
    if page.start < page.end and not only_batches:
        wanted = Wanted(
            arrived=(_moment(page.start), _moment(page.end)), served=True, routes=report.routes,
            tenants=lists["project_ids"], keys=lists["api_key_ids"], models=lists.get("models"),
        )  # fmt: skip
        groups = [width.grouping, *(_GROUPS[name] for name in names if name in _GROUPS)]
        with reading(usage.settings, "limit", _FEWER):
            rows = await _read(report, usage, wanted, groups, by_item=_LINE_ITEM in names)
        for group, amounts in rows:
            border = border_of(group[width.grouping] or "")
            results.setdefault(border, []).append(_result(report, names, group, amounts))
    buckets = [
        {
            "object": "bucket",
            "start_time": start,
            "end_time": end,
            "results": results.get(page.border(start), []),
        }
        for start, end in page.buckets()
    ]
    body = {
        "object": "page",
        "data": buckets,
        "has_more": page.next is not None,
        "next_page": None if page.next is None else cursor_of(page.next),
    }
    return Response(orjson.dumps(body), media_type="application/json")


async def _read(
    report: _Report, usage: UsageReader, wanted: Wanted, groups: list[Grouping], *, by_item: bool
) -> list[_Row]:
    """Return what was used in each group, by line item if need be."""
    if not by_item:
        totals = await usage.totals(wanted, groups)
        return [(total.group, report.amounts(total)) for total in totals]
    priced = await usage.priced(wanted, [*groups, Grouping.MODEL])
    return [(item.group, _item(item)) for item in line_items(priced, groups)]


def _page(report: _Report, query: UsageQuery, width: Width, max_days: int, now: int) -> Page:
    """Return the page that is asked for.

    Raises:
        InvalidRequest: a parameter is missing or invalid.
    """
    default, most = report.limits[width]
    # The operator's bound on what is read at once.
    most = min(most, max_days * Width.DAY.seconds // width.seconds)
    limit = query.number("limit", 1, most)
    start, end, cursor = query.time("start_time"), query.time("end_time"), query.text("page")
    if start is None:
        raise errors.InvalidRequest("Missing required parameter: 'start_time'.", param="start_time")
    if end is not None and end <= start:
        raise errors.InvalidRequest(
            "Invalid 'end_time': expected a time after 'start_time'.", param="end_time"
        )
    end = now if end is None else end
    if cursor is not None:
        begins = start_of(cursor)
        if begins is None or not start < begins < end or begins % width.seconds:
            raise errors.InvalidRequest(
                "Invalid 'page': expected the 'next_page' of an answer to the same query.",
                param="page",
            )
        start = begins
    return page_of(start, end, width, min(default, most) if limit is None else limit)


def _result(
    report: _Report,
    names: tuple[str, ...],
    group: Mapping[str, str | None],
    amounts: Mapping[str, Any],
) -> dict[str, Any]:
    groups = {
        name: group[_GROUPS[name]] if name in _GROUPS else _CONSTANTS.get(name) for name in names
    }
    return {"object": report.object, **dict.fromkeys(report.groups), **groups, **amounts}


def _moment(at: int) -> datetime:
    return datetime.fromtimestamp(at, UTC)
