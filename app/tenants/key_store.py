"""API keys in the database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    Row,
    Text,
    case,
    cast,
    func,
    insert,
    select,
    update,
)

from app.core.tiers import Tier
from app.store.database import translated
from app.store.schema import api_keys
from app.tenants.keys import MAX_NAME, ApiKey, KeyLimits, KeyTable


class KeyStore:
    """The keys in a database.

    Every method may block, and raises ``StoreAway`` if the database cannot be used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, key: ApiKey) -> None:
        """Store a new key."""
        values = {
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
        }
        with translated(), self._engine.begin() as connection:
            connection.execute(insert(api_keys).values(values))

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
        """Return the working keys, and the errors of invalid rows."""
        return KeyTable.of(*self._read(every=False))

    def _read(self, *, every: bool) -> tuple[list[ApiKey], dict[str, str]]:
        # Read as text, so that the database returns a row whatever it holds.
        columns: list[ColumnElement[Any]] = [
            cast(column, Text).label(column.name) for column in api_keys.c
        ]
        if self._engine.dialect.name == "sqlite":
            columns = [_sqlite_text(column).label(column.name) for column in api_keys.c]
        query = select(*columns)
        if not every:
            query = query.where(api_keys.c.revoked.is_(None))
        with translated(), self._engine.connect() as connection:
            rows: Sequence[Row[Any]] = connection.execute(query).all()
        keys, unreadable = [], {}
        for row in rows:
            try:
                keys.append(_key(row))
            except (ValueError, ArithmeticError, TypeError, AttributeError) as error:
                unreadable[str(row.key_id)[:MAX_NAME]] = f"{type(error).__name__}: {error}"[:200]
        return keys, unreadable


def _sqlite_text(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a column as text. SQLite stores bytes in any column; they become an invalid text."""
    return case((func.typeof(column) == "blob", "bytes\n"), else_=cast(column, Text))


def _key(row: Row[Any]) -> ApiKey:
    """Return the key of a row of text values.

    Raises:
        ValueError, ArithmeticError, TypeError, AttributeError: a value is invalid.
    """
    if not (row.key_id or "").isalnum():
        raise ValueError("a key has an id")
    tiers = frozenset(Tier(name) for name in row.tiers.split(","))
    share = None if row.priority_share is None else Decimal(row.priority_share)
    limits = KeyLimits(_whole(row.rpm), _whole(row.tpm), share)
    return ApiKey(
        row.key_id, row.secret_hash, row.tenant, row.name, Tier(row.default_tier), tiers, limits,
        _moment(row.created), None if row.revoked is None else _moment(row.revoked),
    )  # fmt: skip


def _whole(text: str | None) -> int | None:
    return None if text is None else int(text)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time has a time zone")
    return moment
