"""``GET /v1/usage``: totals of the caller's usage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, timedelta

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.config.usage_reads import UsageSettings
from app.core import errors
from app.core.tiers import Tier
from app.gateway.handler import identify
from app.gateway.services import Services
from app.ledger.record import MAX_TEXT, is_stored_text, now_utc
from app.ledger.record_store import TooManyRows, Wanted
from app.ledger.usage import Grouping, usage_object
from app.store.database import StoreAway, StoreTooSlow

_DEFAULT_GROUPS = (Grouping.DAY, Grouping.MODEL, Grouping.TIER)
# The groupings offered to a tenant. Its own name is left out: it is the same in every record.
_GROUPS = tuple(one for one in Grouping if one is not Grouping.TENANT)
_FEWER = "fewer days"
_PARAMETERS = frozenset({"start", "end", "group_by", "model", "key", "tier"})


def add_usage_route(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the route. A tenant sees its own usage, of all its keys."""

    @api.get(f"{prefix}/usage")
    async def usage(request: Request) -> Response:
        caller = await identify(services, request.scope["headers"])
        query = request.query_params
        for name in query:
            if name not in _PARAMETERS:
                raise errors.InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        assert services.usage is not None, "settings come before requests"
        bounds = services.usage.settings
        start, end = span(
            day_of(query.get("start"), "start"), day_of(query.get("end"), "end"),
            now_utc().date(), bounds.max_days,
        )  # fmt: skip
        groups = _groups(query.get("group_by"))
        wanted = Wanted(
            tenant=caller.tenant, since=start, until=end, model=_text(query, "model"),
            key=_text(query, "key"), tier=_tier(query.get("tier")),
        )  # fmt: skip
        with reading(bounds):
            totals = await services.usage.totals(wanted, groups)
        days = {"start": start.isoformat(), "end": end.isoformat()}
        return JSONResponse(usage_object(totals) | days)


@contextmanager
def reading(bounds: UsageSettings, param: str = "start", fewer: str = _FEWER) -> Iterator[None]:
    """Translate what goes wrong while usage is read.

    Args:
        bounds: the bounds on reading.
        param: the parameter that is named where it is too much.
        fewer: what to ask for then, for the error's message.

    Raises:
        InvalidRequest: it is more than may be read at once.
        Unavailable: the database cannot be read.
    """
    try:
        yield
    except TooManyRows:
        raise _too_large(f"has more than {bounds.max_rows} rows", param, fewer) from None
    except StoreTooSlow:
        too_slow = f"takes longer than {bounds.timeout_s:g} s to read"
        raise _too_large(too_slow, param, fewer) from None
    except StoreAway:
        raise errors.Unavailable(
            "Usage cannot be read at the moment. What is used meanwhile is recorded.",
            "ledger_unavailable",
            5.0,
        ) from None


def span(start: date | None, end: date | None, today: date, max_days: int) -> tuple[date, date]:
    """Return the requested period: its first day, and the day after its last.

    The default end is today. The default start gives a period of ``max_days`` days.

    Raises:
        InvalidRequest: the period is longer than ``max_days``.
    """
    tomorrow = today + timedelta(days=1)
    until = end or max(tomorrow, start or tomorrow)
    since = start or date.fromordinal(max(1, min(until, tomorrow).toordinal() - max_days))
    if start is not None and (until - since).days > max_days:
        raise errors.InvalidRequest(
            f"Invalid 'start': at most {max_days} days can be asked for at once, from 'start' to "
            "'end'.",
            param="start",
        )
    return since, until


def _too_large(why: str, param: str, fewer: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"The usage that is asked for {why}. Ask for {fewer}, or for fewer groups ('group_by').",
        code="usage_too_large",
        param=param,
    )


def day_of(text: str | None, name: str) -> date | None:
    """Return the day in a parameter; ``None`` without it.

    Raises:
        InvalidRequest: it is no day.
    """
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise errors.InvalidRequest(
            f"Invalid '{name}': expected a day such as 2026-11-22.", param=name
        ) from None


def _text(query: Mapping[str, str], name: str) -> str | None:
    """Return the value of a filter; ``None`` without it."""
    text = query.get(name)
    if text is not None and not is_stored_text(text):
        raise errors.InvalidRequest(
            f"Invalid '{name}': expected from 1 to {MAX_TEXT} characters.", param=name
        )
    return text


def _tier(text: str | None) -> Tier | None:
    try:
        return None if text is None else Tier(text)
    except ValueError:
        raise errors.InvalidRequest(
            f"Invalid 'tier': expected one of {', '.join(Tier)}.", param="tier"
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
