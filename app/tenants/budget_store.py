"""Budgets in the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, Engine, Row, and_, delete, insert

from app.store.database import translated
from app.store.schema import budgets
from app.store.text_rows import BOOLEANS, INVALID, fault, select_as_text
from app.tenants.budget import Budget, Owner, Period, in_order


@dataclass(frozen=True, slots=True)
class BudgetTable:
    """The budgets at one moment.

    Attributes:
        by_owner: the budgets of each owner, by the kind of owner and its name.
        unreadable: the error of the invalid rows of an owner, likewise.
    """

    by_owner: Mapping[tuple[str, str], Sequence[Budget]]
    unreadable: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def of(self, key_id: str, tenant: str) -> tuple[Budget, ...]:
        """Return the budgets of a key and of its tenant.

        Raises:
            ValueError: one of them is invalid. Without it the key could spend without a bound.
        """
        owners = ((Owner.KEY.value, key_id), (Owner.TENANT.value, tenant))
        for owner in owners:
            if owner in self.unreadable:
                raise ValueError(f"the budget of its {owner[0]}: {self.unreadable[owner]}")
        return tuple(each for owner in owners for each in self.by_owner.get(owner, ()))


class BudgetStore:
    """The budgets in a database.

    Every method may block, and raises ``StoreAway`` if the database cannot be used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def set(self, *given: Budget) -> None:
        """Store budgets. Each replaces that of the same owner and period."""
        with translated(), self._engine.begin() as connection:
            for budget in given:
                add_budget(connection, budget)

    def remove(self, owner: Owner, name: str, period: Period | None = None) -> int:
        """Remove the budgets of an owner, or that of one period; return how many there were."""
        with translated(), self._engine.begin() as connection:
            return _remove(connection, owner, name, period)

    def table(self) -> BudgetTable:
        """Return all budgets."""
        with translated(), self._engine.connect() as connection:
            return read_budgets(connection)


def add_budget(connection: Connection, budget: Budget) -> None:
    """Store a budget in a transaction, in place of that of the same owner and period."""
    _remove(connection, budget.owner, budget.name, budget.period)
    values = {
        "owner": budget.owner.value,
        "name": budget.name,
        "period": budget.period.value,
        "usd": budget.usd,
        "hard": budget.hard,
    }
    connection.execute(insert(budgets).values(values))


def read_budgets(connection: Connection) -> BudgetTable:
    """Return all budgets in a transaction."""
    by_owner: dict[tuple[str, str], list[Budget]] = {}
    unreadable = {}
    for row in connection.execute(select_as_text(budgets, connection.dialect)):
        owner = (str(row.owner), str(row.name))
        try:
            by_owner.setdefault(owner, []).append(_budget(row))
        except INVALID as error:
            unreadable[owner] = fault(error)
    return BudgetTable({owner: in_order(each) for owner, each in by_owner.items()}, unreadable)


def _budget(row: Row[Any]) -> Budget:
    return Budget(
        Owner(row.owner), row.name, Period(row.period), Decimal(row.usd), BOOLEANS[row.hard]
    )


def _remove(connection: Connection, owner: Owner, name: str, period: Period | None) -> int:
    columns = budgets.c
    wanted = and_(columns.owner == owner.value, columns.name == name)
    if period is not None:
        wanted = and_(wanted, columns.period == period.value)
    return connection.execute(delete(budgets).where(wanted)).rowcount
