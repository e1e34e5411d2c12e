"""API keys in the store."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Engine, Row, insert, select, update

from app.keys import ApiKey, KeyTable, Limits
from app.store.database import translated
from app.store.schema import api_keys
from app.tiers import Tier


class KeyStore:
    """The keys in a database.

    Every method may block, and raises ``StoreAway`` where the database cannot be used.
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
        """Let a key work no more, and return whether there was one that did."""
        columns = api_keys.c
        working = (columns.key_id == key_id) & columns.revoked.is_(None)
        with translated(), self._engine.begin() as connection:
            done = connection.execute(update(api_keys).where(working).values(revoked=at))
            return done.rowcount > 0

    def all(self) -> list[ApiKey]:
        """Return every key, the revoked ones too, oldest first."""
        order = (api_keys.c.created, api_keys.c.key_id)
        with translated(), self._engine.connect() as connection:
            return [_key(row) for row in connection.execute(select(api_keys).order_by(*order))]

    def table(self) -> KeyTable:
        """Return the keys that work now."""
        working = select(api_keys).where(api_keys.c.revoked.is_(None))
        with translated(), self._engine.connect() as connection:
            return KeyTable.of(_key(row) for row in connection.execute(working))


def _key(row: Row[Any]) -> ApiKey:
    tiers = frozenset(Tier(name) for name in row.tiers.split(","))
    limits = Limits(row.rpm, row.tpm, row.priority_share)
    return ApiKey(
        row.key_id, row.secret_hash, row.tenant, row.name, Tier(row.default_tier), tiers, limits,
        row.created, row.revoked,
    )  # fmt: skip
