"""API keys in the database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, update

from app.core.addresses import parse_network
from app.core.dialect import Route
from app.core.tiers import Tier
from app.store.database import begin_write, migrate, translated
from app.store.schema import api_keys
from app.store.text_rows import BOOLEANS, INVALID, fault, select_as_text
from app.tenants.budget_store import BudgetTable, add_budget, read_budgets
from app.tenants.keys import MAX_NAME, ApiKey, KeyLimits, KeyTable
from app.tenants.scope import KeyScope, joined


class KeyStore:
    """The keys in a database.

    Every method may block, and raises ``StoreAway`` if the database cannot be used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._prepared = False

    def add(self, key: ApiKey) -> None:
        """Store a new key with its budgets."""
        with translated(), self._engine.begin() as connection:
            connection.execute(insert(api_keys).values(_values(key)))
            for budget in key.budgets:
                add_budget(connection, budget)

    def change(self, key_id: str, changed: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        """Replace a key that is not revoked by what ``changed`` returns for it, and return that.

        ``None`` if there is none with this id, or its row is invalid. Budgets stay as they are.
        Two changes at once are made one after the other. What ``changed`` raises is raised.
        """
        with translated(), begin_write(self._engine) as connection:
            mine = (api_keys.c.key_id == key_id) & api_keys.c.revoked.is_(None)
            query = select_as_text(api_keys, self._engine.dialect).where(mine).with_for_update()
            keys, _ = _read(connection, connection.execute(query).all())
            if not keys:
                return None
            key = changed(keys[0])
            connection.execute(update(api_keys).where(mine).values(_values(key)))
            return key

    def get(self, key_id: str) -> ApiKey | None:
        """Return the key with an id, or ``None`` if there is none or its row is invalid."""
        query = select_as_text(api_keys, self._engine.dialect).where(api_keys.c.key_id == key_id)
        with translated(), self._engine.connect() as connection:
            keys, _ = _read(connection, connection.execute(query).all())
        return keys[0] if keys else None

    def revoke(self, key_id: str, at: datetime) -> bool:
        """Revoke a key; return whether there was a working key with this id."""
        columns = api_keys.c
        working = (columns.key_id == key_id) & columns.revoked.is_(None)
        with translated(), self._engine.begin() as connection:
            done = connection.execute(update(api_keys).where(working).values(revoked=at))
            return done.rowcount > 0

    def all(self) -> list[ApiKey]:
        """Return every valid key, including revoked ones, oldest first."""
        return self.listing()[0]

    def listing(self) -> tuple[list[ApiKey], dict[str, str]]:
        """Return the keys as ``all`` does, and the error of each invalid row, by key id."""
        keys, unreadable = self._read(every=True)
        return sorted(keys, key=lambda key: (key.created, key.key_id)), unreadable

    def table(self) -> KeyTable:
        """Return the working keys, and the errors of invalid rows.

        The tables are migrated first, because those of an older version lack columns.
        """
        if not self._prepared:
            migrate(self._engine)
        # Until a read has succeeded; the store may come back as another one.
        self._prepared = False
        keys = KeyTable.of(*self._read(every=False))
        self._prepared = True
        return keys

    def _read(self, *, every: bool) -> tuple[list[ApiKey], dict[str, str]]:
        query = select_as_text(api_keys, self._engine.dialect)
        if not every:
            query = query.where(api_keys.c.revoked.is_(None))
        with translated(), self._engine.connect() as connection:
            return _read(connection, connection.execute(query).all())


def _read(connection: Connection, rows: Sequence[Row[Any]]) -> tuple[list[ApiKey], dict[str, str]]:
    """Return the keys of rows of text values, and the errors of invalid ones and of budgets."""
    budgets = read_budgets(connection)
    keys, unreadable = [], {}
    for row in rows:
        try:
            keys.append(_key(row, budgets))
        except INVALID as error:
            unreadable[str(row.key_id)[:MAX_NAME]] = fault(error)
    for (owner, name), why in budgets.unreadable.items():
        unreadable[f"of the budget of {owner} {name}"[:MAX_NAME]] = why
    return keys, unreadable


def _values(key: ApiKey) -> dict[str, Any]:
    """Return the row of a key."""
    return {
        "key_id": key.key_id,
        "secret_hash": key.secret_hash,
        "tenant": key.tenant,
        "name": key.name,
        "default_tier": key.default_tier.value,
        "tiers": ",".join(tier.value for tier in Tier if tier in key.tiers),
        "rpm": key.limits.rpm,
        "tpm": key.limits.tpm,
        "priority_share": key.limits.priority_share,
        "created": key.created,
        "revoked": key.revoked,
        "admin": key.admin,
        "models": joined(key.scope.models),
        "routes": joined(key.scope.routes),
        "in_flight": key.limits.in_flight,
        "expires": key.expires,
        "addresses": joined(key.scope.addresses),
    }


def _key(row: Row[Any], budgets: BudgetTable) -> ApiKey:
    """Return the key of a row of text values.

    Raises:
        ValueError, ArithmeticError, TypeError, AttributeError, LookupError: a value is invalid.
    """
    if not (row.key_id or "").isalnum():
        raise ValueError("a key has an id")
    tiers = frozenset(Tier(name) for name in row.tiers.split(","))
    share = None if row.priority_share is None else Decimal(row.priority_share)
    limits = KeyLimits(_whole(row.rpm), _whole(row.tpm), share, _whole(row.in_flight))
    routes, addresses = _parts(row.routes), _parts(row.addresses)
    scope = KeyScope(
        _parts(row.models),
        None if routes is None else frozenset(map(Route, routes)),
        None if addresses is None else frozenset(map(parse_network, addresses)),
    )
    return ApiKey(
        row.key_id, row.secret_hash, row.tenant, row.name, Tier(row.default_tier), tiers, limits,
        _moment(row.created), None if row.revoked is None else _moment(row.revoked),
        BOOLEANS[row.admin], scope, None if row.expires is None else _moment(row.expires),
        budgets.of(row.key_id, row.tenant),
    )  # fmt: skip


def _parts(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(text.split(","))


def _whole(text: str | None) -> int | None:
    return None if text is None else int(text)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time has a time zone")
    return moment
