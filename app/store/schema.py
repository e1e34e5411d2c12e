"""The tables of the store. Migrations make them; queries are written with them."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    TypeDecorator,
    false,
)


class Amount(TypeDecorator[Decimal]):
    """Money with every digit: NUMERIC in PostgreSQL; text in SQLite, which has no decimals."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Return the column's type in one database."""
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Return what is stored."""
        return format(value, "f") if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Return what was stored."""
        return None if value is None else Decimal(value)


class Moment(TypeDecorator[datetime]):
    """A time in UTC: ``timestamptz`` in PostgreSQL; ISO 8601, which sorts, in SQLite."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Return the column's type in one database."""
        sqlite = dialect.name == "sqlite"
        return dialect.type_descriptor(String(32) if sqlite else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """Return what is stored."""
        return value.isoformat() if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return what was stored."""
        return datetime.fromisoformat(value) if isinstance(value, str) else value


metadata = MetaData()

usage_records = Table(
    "usage_records",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("requested_tier", Text),
    Column("served_tier", Text),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("engine", Text, nullable=False),
    Column("replica", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("input_price", Amount),
    Column("cached_input_price", Amount),
    Column("output_price", Amount),
    Column("multiplier", Amount),
    Column("rate_card", Text, nullable=False),
    Column("cost", Amount, nullable=False),
    Column("queue_s", Float, nullable=False),
    Column("ttft_s", Float),
    Column("duration_s", Float, nullable=False),
    Column("arrived", Moment, nullable=False),
    Column("ended", Moment, nullable=False),
    # Journals and ingresses from before there was the column write records without it.
    Column("usage_estimated", Boolean, nullable=False, server_default=false()),
    # The day of `arrived` in UTC, which is the day on the bill.
    Column("day", Date, nullable=False),
    Index("usage_records_by_tenant", "tenant", "day"),
    Index("usage_records_by_day", "day"),
)

# Values are read as they are stored, and each row is checked by itself (``app.tenants.key_store``):
# one that cannot be read must not keep the others from being read.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("secret_hash", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("default_tier", Text, nullable=False),
    # The tiers that it may use, separated by commas.
    Column("tiers", Text, nullable=False),
    Column("rpm", Integer),
    Column("tpm", BigInteger),
    Column("priority_share", Amount),
    Column("created", Moment, nullable=False),
    Column("revoked", Moment),
)
