"""What the usage page shows, worked out from totals and records. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final

from app.core.tier_decision import downgrade_reason
from app.core.tiers import Tier
from app.ledger.record import State, UsageRecord
from app.ledger.record_store import Place
from app.ledger.usage import Total, add_up, plain, record_fields
from app.tenants.budget import Owner, Period
from app.tenants.budget_gate import BudgetState

CSV_FIELDS: Final = (
    "arrived", "request_id", "tenant", "key_id", "model", "route", "stream", "requested_tier",
    "served_tier", "state", "reason", "prompt_tokens", "cached_tokens", "completion_tokens",
    "cache_write_tokens", "images", "audio_seconds", "input_price", "cached_input_price",
    "output_price", "cache_write_price", "image_price", "audio_second_price", "multiplier", "cost",
    "queue_s", "ttft_s", "duration_s", "usage_estimated",
)  # fmt: skip
"""The fields of a record in a tenant's CSV: what explains its cost, and not where it ran."""
MOST_LINES: Final = 200
"""Lines of totals on the page; a CSV has all of them."""
_HEIGHT: Final = 100


@dataclass(frozen=True, slots=True)
class Bar:
    """One part of a bar, in the units of the drawing (0 to 100, from the top)."""

    tier: str
    top: float
    height: float


@dataclass(frozen=True, slots=True)
class DayBar:
    """The cost of one day, with its parts by tier from the bottom up."""

    day: str
    cost: str
    parts: tuple[Bar, ...]


def bars(totals: Iterable[Total], since: date, until: date) -> list[DayBar]:
    """Return a bar for each day of a period, in proportion to the day that cost most."""
    costs: dict[str, dict[str, Decimal]] = {}
    for total in totals:
        day, tier = total.group["day"] or "", total.group["tier"]
        if tier is not None:
            by_tier = costs.setdefault(day, {})
            by_tier[tier] = by_tier.get(tier, Decimal(0)) + total.cost
    most = max((sum(one.values(), Decimal(0)) for one in costs.values()), default=Decimal(0))
    days = (date.fromordinal(number).isoformat() for number in _ordinals(since, until))
    return [_bar(day, costs.get(day, {}), most) for day in days]


def _ordinals(since: date, until: date) -> range:
    return range(since.toordinal(), until.toordinal())


def _bar(day: str, costs: Mapping[str, Decimal], most: Decimal) -> DayBar:
    top, parts = float(_HEIGHT), []
    for tier in Tier:
        if most and (cost := costs.get(tier.value)):
            height = float(_HEIGHT * cost / most)
            top -= height
            parts.append(Bar(tier.value, round(top, 2), round(height, 2)))
    return DayBar(day, money(sum(costs.values(), Decimal(0))), tuple(parts))


def lines(totals: Sequence[Total]) -> list[dict[str, Any]]:
    """Return the latest totals as lines of a table."""
    latest = sorted(totals, key=lambda one: one.group["day"] or "", reverse=True)[:MOST_LINES]
    return [_line(one) for one in latest]


def _line(total: Total) -> dict[str, Any]:
    return {
        **total.group,
        "requests": f"{total.requests:,}",
        "prompt": f"{total.prompt_tokens:,}",
        "completion": f"{total.completion_tokens:,}",
        "cost": money(total.cost),
    }


def summary(totals: Iterable[Total]) -> dict[str, Any]:
    """Return the sum of all totals."""
    return _line(add_up(totals))


def record_line(record: UsageRecord) -> dict[str, Any]:
    """Return a record as a line of a table."""
    requested = record.origin.requested
    served = record.served
    return {
        "arrived": record.origin.arrived.strftime("%Y-%m-%d %H:%M:%S"),
        "request_id": record.origin.request_id,
        "model": record.origin.model,
        "requested": requested.value if requested else "auto",
        "served": served.value if served else "",
        "differs": downgrade_reason(requested, served, record.reason) is not None,
        "state": record.state.value,
        "well": record.state is State.COMPLETED,
        "reason": (record.reason or "").replace("_", " "),
        "tokens": f"{record.usage.prompt_tokens:,} / {record.usage.completion_tokens:,}",
        "cost": money(record.cost),
        "ttft": "" if record.ttft_s is None else f"{record.ttft_s * 1000:,.0f} ms",
    }


def csv_row(record: UsageRecord) -> dict[str, Any]:
    """Return a record as a row of a CSV."""
    fields = record_fields(record)
    return {name: fields[name] for name in CSV_FIELDS}


def place_of(record: UsageRecord) -> str:
    """Return the place of a record as a parameter; ``read_place`` reads it."""
    return f"{record.origin.arrived.isoformat()} {record.origin.request_id}"


def read_place(text: str) -> Place:
    """Return the place in a parameter.

    Raises:
        ValueError: it is none.
    """
    moment, _, request_id = text.partition(" ")
    arrived = datetime.fromisoformat(moment)
    if arrived.tzinfo is None or not request_id or not request_id.isprintable():
        raise ValueError("a place is a time and a request id")
    return arrived, request_id


def limits(headers: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the limits in ``x-ratelimit-*`` headers, with what is left of each."""
    return [
        {
            "name": f"{name} a minute",
            "limit": f"{int(headers[f'x-ratelimit-limit-{name}']):,}",
            "left": f"{int(headers[f'x-ratelimit-remaining-{name}']):,}",
            "reset": headers[f"x-ratelimit-reset-{name}"],
        }
        for name in ("requests", "tokens")
        if f"x-ratelimit-limit-{name}" in headers
    ]


def budget_line(state: BudgetState) -> dict[str, str]:
    """Return a budget as a line of a table. Amounts that are not known are empty."""
    budget, resets = state.budget, state.resets
    return {
        "owner": "this key" if budget.owner is Owner.KEY else "the tenant",
        "period": "in total" if budget.period is Period.TOTAL else f"a {budget.period}",
        "limit": money(budget.usd),
        "spent": "" if state.spent is None else money(state.spent),
        "left": "" if state.left is None else money(state.left),
        "resets": "" if resets is None else resets.isoformat(),
        "then": "requests are refused" if budget.hard else "there is an alert",
    }


def money(amount: Decimal) -> str:
    """Return an amount in USD with every digit, and at least two decimals."""
    text = plain(amount)
    whole, _, decimals = text.partition(".")
    return f"{int(whole):,}.{decimals.ljust(2, '0')}"
