"""``/usage``: what a tenant has used, what is left of limits and budgets, and CSV files of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from io import StringIO
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.routing import Route

from app.core import errors
from app.gateway.cross_site import refuse_other_sites
from app.gateway.me_route import budget_states
from app.gateway.services import Services
from app.gateway.usage_reader import UsageReader
from app.gateway.usage_route import day_of, reading, span
from app.ledger.record import now_utc
from app.ledger.record_store import Place, TooManyRows, Wanted
from app.ledger.usage import Grouping, plain, write_csv
from app.tenants.access import Caller
from app.web import usage_view as view
from app.web.pages import add_page, render
from app.web.visitors import visitor

_PATH: Final = "/usage"
_DAYS: Final = 30
_RECORDS: Final = 50
_GROUPS: Final = (Grouping.DAY, Grouping.MODEL, Grouping.TIER)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request asks for: whose usage, of which days, before which record."""

    caller: Caller
    reader: UsageReader
    since: date
    until: date
    before: Place | None

    @property
    def wanted(self) -> Wanted:
        return Wanted(tenant=self.caller.tenant, since=self.since, until=self.until)


def add_usage_pages(api: FastAPI, services: Services) -> None:
    """Add the page and its files. Where keys are required, a tenant sees its own usage."""

    async def show(request: Request) -> Response:
        try:
            asked = await _asked(services, request)
        except errors.InvalidKey:
            return RedirectResponse(f"/login?next={_PATH}", 303, {"cache-control": "no-store"})
        return render("usage.html", here=_PATH, **await _context(services, asked))

    async def records(request: Request) -> Response:
        refuse_other_sites(dict(request.scope["headers"]))
        asked = await _asked(services, request)
        most = asked.reader.settings.max_rows
        with reading(asked.reader.settings):
            found = await asked.reader.latest(asked.wanted, most + 1)
            if len(found) > most:
                raise TooManyRows
        return await _csv("records", asked, map(view.csv_row, reversed(found)))

    async def totals(request: Request) -> Response:
        refuse_other_sites(dict(request.scope["headers"]))
        asked = await _asked(services, request)
        with reading(asked.reader.settings):
            found = await asked.reader.totals(asked.wanted, _GROUPS)
        return await _csv("totals", asked, (total.to_fields() for total in found))

    add_page(api, _PATH, show)
    for name, answer in (("records.csv", records), ("totals.csv", totals)):
        api.router.routes.append(Route(f"{_PATH}/{name}", answer, methods=["GET"]))


async def _asked(services: Services, request: Request) -> _Asked:
    caller, query = await visitor(services, request), request.query_params
    reader = services.usage
    assert reader is not None, "settings come before requests"
    today = now_utc().date()
    # A form sends fields that are left empty.
    start = day_of(query.get("start") or None, "start")
    last = day_of(query.get("end") or None, "end")
    # People give the last day, the API the day after it.
    end = None if last is None else _day_after(last)
    if start is None and end is None:
        start = today - timedelta(days=_DAYS - 1)
    if start is None and end is not None:
        # What is to come has no records, and the page has a bar for each day.
        end = min(end, _day_after(today))
    since, until = span(start, end, today, reader.settings.max_days)
    return _Asked(caller, reader, since, until, _place(query.get("before")))


def _day_after(day: date) -> date:
    return date.fromordinal(min(day.toordinal() + 1, date.max.toordinal()))


def _place(text: str | None) -> Place | None:
    try:
        return None if text is None else view.read_place(text)
    except ValueError:
        raise errors.InvalidRequest("Invalid 'before'.", param="before") from None


async def _context(services: Services, asked: _Asked) -> dict[str, Any]:
    with reading(asked.reader.settings):
        totals = await asked.reader.totals(asked.wanted, _GROUPS)
        found = await asked.reader.latest(asked.wanted, _RECORDS + 1, asked.before)
    shown, access = found[:_RECORDS], services.access
    headers = {} if access is None else dict(access.headers(asked.caller))
    key = asked.caller.key
    share = None if key is None else key.limits.priority_share
    budgets = await budget_states(services, asked.caller)
    return {
        "tenant": asked.caller.tenant,
        "key_id": asked.caller.key_id,
        "signed_in": access is not None,
        "start": asked.since.isoformat(),
        "end": (asked.until - timedelta(days=1)).isoformat(),
        "bars": view.bars(totals, asked.since, asked.until),
        "lines": view.lines(totals),
        "left_out": max(0, len(totals) - view.MOST_LINES),
        "sum": view.summary(totals),
        "limits": view.limits(headers),
        "budgets": [view.budget_line(state) for state in budgets],
        "share": None if share is None else f"{plain(100 * share)} %",
        "records": [view.record_line(record) for record in shown],
        "older": view.place_of(shown[-1]) if len(found) > _RECORDS else "",
    }


async def _csv(name: str, asked: _Asked, rows: Iterable[dict[str, Any]]) -> Response:
    def write() -> str:
        out = StringIO()
        write_csv(rows, out)
        return out.getvalue()

    # Ten thousand rows take a tenth of a second.
    body = await asyncio.to_thread(write)
    last = asked.until - timedelta(days=1)
    headers = {
        "content-disposition": f'attachment; filename="usage-{name}-{asked.since}-{last}.csv"',
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
    }
    return Response(body, 200, headers, "text/csv; charset=utf-8")
