"""Budgets: how much a key or a tenant may spend in a period. Pure: the day is passed in.

Days and months are those of the bill: in UTC, by the arrival of a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Final, NamedTuple

MAX_USD: Final = Decimal(10) ** 12
_MAX_DECIMALS: Final = 12
_WARN: Final = "warn"
_HARD: Final = "hard"


class Owner(StrEnum):
    """Whose budget it is."""

    KEY = "key"
    TENANT = "tenant"


class Period(StrEnum):
    """How long a budget is for."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"
    """All requests that were ever made."""

    def start(self, day: date) -> date | None:
        """Return the first day of the period that a day is in; ``None`` for the total."""
        if self is Period.TOTAL:
            return None
        return day if self is Period.DAY else day.replace(day=1)

    def end(self, day: date) -> date | None:
        """Return the day after the period that a day is in; ``None`` for the total."""
        if self is Period.TOTAL:
            return None
        if self is Period.DAY:
            return day + timedelta(days=1)
        return (day.replace(day=28) + timedelta(days=4)).replace(day=1)


class SpendId(NamedTuple):
    """What is added up for a budget: the spend of an owner in one period.

    Attributes:
        owner: the kind of owner.
        name: the id of the key, or the name of the tenant.
        period: the kind of period.
        start: the first day; ``None`` for the total.
        end: the day after the last; ``None`` for the total.
    """

    owner: Owner
    name: str
    period: Period
    start: date | None
    end: date | None


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget.

    Attributes:
        owner: the kind of owner.
        name: the id of the key, or the name of the tenant.
        period: how long it is for.
        usd: the amount in USD.
        hard: whether requests are refused once it is spent; otherwise it only alerts.
    """

    owner: Owner
    name: str
    period: Period
    usd: Decimal
    hard: bool = True

    def __post_init__(self) -> None:
        if not (self.usd.is_finite() and 0 <= self.usd <= MAX_USD):
            raise ValueError(f"a budget is from 0 to {MAX_USD} USD")
        if -int(self.usd.as_tuple().exponent) > _MAX_DECIMALS:
            raise ValueError(f"a budget has at most {_MAX_DECIMALS} decimal places")

    def at(self, day: date) -> SpendId:
        """Return what it bounds on a day."""
        period = self.period
        return SpendId(self.owner, self.name, period, period.start(day), period.end(day))

    @property
    def mode(self) -> str:
        """``hard`` or ``warn``."""
        return _HARD if self.hard else _WARN

    def __str__(self) -> str:
        """Return what ``parse_budget`` reads."""
        return f"{self.period}={self.usd:f}" + ("" if self.hard else f":{_WARN}")


def parse_budget(text: str, owner: Owner, name: str) -> Budget:
    """Return the budget in a text such as ``month=100`` or ``day=5:warn``.

    Raises:
        ValueError: it is none; the message says what is expected.
    """
    period, _, rest = text.strip().partition("=")
    amount, _, mode = rest.partition(":")
    try:
        if mode not in ("", _HARD, _WARN):
            raise ValueError(mode)
        return Budget(owner, name, Period(period), Decimal(amount), mode != _WARN)
    except (ValueError, InvalidOperation):
        raise ValueError(
            f"budget {text[:50]!r}: expected {'|'.join(Period)}=USD, or the same with :{_WARN}"
        ) from None


def parse_budgets(texts: Iterable[str], owner: Owner, name: str) -> tuple[Budget, ...]:
    """Return the budgets in texts, by ``parse_budget``.

    Raises:
        ValueError: one of them is none, or two are for the same period.
    """
    found = [parse_budget(text, owner, name) for text in texts]
    if len({budget.period for budget in found}) < len(found):
        raise ValueError("budgets: at most one for each period")
    return in_order(found)


def in_order(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """Return the budgets of one owner, the shortest period first."""
    order = list(Period)
    return tuple(sorted(budgets, key=lambda budget: order.index(budget.period)))
