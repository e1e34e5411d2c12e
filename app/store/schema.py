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
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


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


class hour_of(FunctionElement[str]):
    """The hour of a time, in UTC, as text such as ``2026-11-29T22``."""

    type = Text()
    inherit_cache = True


class minute_of(FunctionElement[str]):
    """The minute of a time, in UTC, as text such as ``2026-11-29T22:05``."""

    type = Text()
    inherit_cache = True


@compiles(hour_of)
def _hour_in_postgresql(element: hour_of, compiler: SQLCompiler, **options: Any) -> str:
    moment = compiler.process(element.clauses, **options)
    return f"to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24')"


@compiles(hour_of, "sqlite")
def _hour_in_sqlite(element: hour_of, compiler: SQLCompiler, **options: Any) -> str:
    return f"substr({compiler.process(element.clauses, **options)}, 1, 13)"


@compiles(minute_of)
def _minute_in_postgresql(element: minute_of, compiler: SQLCompiler, **options: Any) -> str:
    moment = compiler.process(element.clauses, **options)
    return f"to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI')"


@compiles(minute_of, "sqlite")
def _minute_in_sqlite(element: minute_of, compiler: SQLCompiler, **options: Any) -> str:
    return f"substr({compiler.process(element.clauses, **options)}, 1, 16)"


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
    # NULL where the engine does not tell how often it has suspended a request.
    Column("preemptions", Integer),
    # The ingress process that recorded it; empty in records from before there was the column.
    Column("ingress", Text, nullable=False, server_default=""),
    # Journals and ingresses from before there were these columns write records without them.
    Column("cache_write_tokens", BigInteger, nullable=False, server_default="0"),
    Column("images", BigInteger, nullable=False, server_default="0"),
    Column("audio_seconds", BigInteger, nullable=False, server_default="0"),
    Column("cache_write_price", Amount),
    Column("image_price", Amount),
    Column("audio_second_price", Amount),
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
    # Ingresses from before there was the column create no keys, but `frontline keys` of then does.
    Column("admin", Boolean, nullable=False, server_default=false()),
    # The models and routes that it may use, separated by commas; NULL for all.
    Column("models", Text),
    Column("routes", Text),
    Column("in_flight", Integer),
    Column("expires", Moment),
    # The networks from which it may be used, separated by commas; NULL for everywhere.
    Column("addresses", Text),
)

# As `api_keys`: read as text, and checked row by row.
budgets = Table(
    "budgets",
    metadata,
    # Whose it is: `key` or `tenant`, and the key's id or the tenant's name.
    Column("owner", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("usd", Amount, nullable=False),
    # Whether requests over it are refused; otherwise it only alerts.
    Column("hard", Boolean, nullable=False),
)

# The usage of all records, by what a cost is computed from: a trigger of the database adds each
# record as it is written, in the same transaction. So what was spent is read from a few rows.
spend = Table(
    "spend",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("day", Date, primary_key=True),
    Column("ingress", Text, primary_key=True),
    Column("tenant", Text, primary_key=True),
    Column("input_price", Amount, primary_key=True),
    Column("cached_input_price", Amount, primary_key=True),
    Column("output_price", Amount, primary_key=True),
    Column("multiplier", Amount, primary_key=True),
    # Those of records without a price are 0: NULL would be no part of a key.
    Column("cache_write_price", Amount, primary_key=True),
    Column("image_price", Amount, primary_key=True),
    Column("audio_second_price", Amount, primary_key=True),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cache_write_tokens", BigInteger, nullable=False),
    Column("images", BigInteger, nullable=False),
    Column("audio_seconds", BigInteger, nullable=False),
    Index("spend_by_tenant", "tenant", "day"),
)
