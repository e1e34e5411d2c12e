"""Usage records in the database: each is written once, and read for bills."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Engine,
    Float,
    Integer,
    TextClause,
    and_,
    func,
    select,
    text,
    tuple_,
)

from app.core.pricing import EXACT, Prices, TokenUsage
from app.core.tiers import Tier
from app.ledger.record import PRICES, USED, UsageRecord, with_former_prices
from app.ledger.usage import Grouping, Priced, Total, add_up
from app.store.database import StoreAway, StoreRefuses, migrate, translated
from app.store.schema import Amount, Moment, hour_of, minute_of, spend, usage_records
from app.store.sqlite_file import MISSING, Identity, identity, path_of, was_replaced
from app.tenants.budget import Owner, SpendId

READ_AT_ONCE: Final = 1000
_SERVER: Final[Identity] = (-1, -1)
"""The identity of a store that is a database server and not a file."""


Place = tuple[datetime, str]
"""Where a record stands in the order of arrival: when it arrived, and its request id."""


class TooManyRows(Exception):
    """There are more groups than ``max_rows``."""


class RecordStore:
    """The usage records in a database.

    Every method may block, and raises ``StoreAway`` if the database cannot be used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._prepared: Identity | None = None
        self._insert = insert_statement(engine.dialect.name)

    def prepare(self) -> bool:
        """Migrate the tables if needed.

        Returns:
            Whether this may be another store than before: SQLite's file was replaced, the store
            was away, or nothing was prepared yet.
        """
        path = path_of(self._engine.url)
        # Read before the migration, so that a file replaced meanwhile is noticed the next time.
        store = _SERVER if path is None else identity(path)
        if store == self._prepared and store != MISSING:
            return False
        migrate(self._engine)
        self._prepared = store
        return True

    def add(self, bodies: Sequence[bytes]) -> None:
        """Write settled records, given as JSON (``UsageRecord.to_json``), in one transaction.

        A request that already has a record keeps it, so writing twice changes nothing. The database
        itself parses the JSON, because this thread shares its interpreter with requests.
        """
        batch = b"[" + b",".join(bodies) + b"]"
        try:
            self._add(batch.decode())
        except StoreRefuses:
            raise
        except StoreAway:
            # It may come back as another store: from a backup, or a standby.
            self._prepared = None
            raise

    def _add(self, batch: str) -> None:
        with translated(), self._engine.connect() as connection:
            connection.execute(self._insert, {"batch": batch})
            connection.commit()
            if was_replaced(connection):
                raise StoreAway("its file was replaced while it was written to")

    def each(self, wanted: Wanted) -> Iterator[UsageRecord]:
        """Yield records in the order of their arrival, from one consistent snapshot."""
        query = select(usage_records).where(wanted.condition())
        order = (usage_records.c.arrived, usage_records.c.request_id)
        with translated(), self._engine.connect() as connection:
            streamed = connection.execution_options(yield_per=READ_AT_ONCE)
            for row in streamed.execute(query.order_by(*order)).mappings():
                yield UsageRecord.from_fields(dict(row))

    def latest(self, wanted: Wanted, most: int, before: Place | None = None) -> list[UsageRecord]:
        """Return at most so many records, the latest first; ``before`` one, if it is given."""
        columns = usage_records.c
        query = select(usage_records).where(wanted.condition())
        if before is not None:
            query = query.where(tuple_(columns.arrived, columns.request_id) < before)
        query = query.order_by(columns.arrived.desc(), columns.request_id.desc()).limit(most)
        with translated(), self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [UsageRecord.from_fields(dict(row)) for row in rows]

    def totals(
        self, wanted: Wanted, groupings: Sequence[Grouping], max_rows: int | None = None
    ) -> list[Total]:
        """Return totals of records, in the order of their groups.

        The totals equal the sum of the records exactly: the cost is tokens times prices.

        Raises:
            TooManyRows: see ``priced``.
        """
        totals: dict[tuple[str | None, ...], list[Total]] = {}
        for one in self.priced(wanted, groupings, max_rows):
            totals.setdefault(tuple(one.group.values()), []).append(one.total())
        names = [grouping.value for grouping in groupings]
        return [
            replace(add_up(parts), group=dict(zip(names, key, strict=True)))
            for key, parts in sorted(totals.items(), key=lambda item: [v or "" for v in item[0]])
        ]

    def priced(
        self, wanted: Wanted, groupings: Sequence[Grouping], max_rows: int | None = None
    ) -> list[Priced]:
        """Return the usage of each group and each set of prices, which the database adds up.

        Raises:
            TooManyRows: there are more than ``max_rows`` groups, each with one set of prices.
        """
        groups = [_GROUPS[grouping].label(grouping.value) for grouping in groupings]
        sums = [func.count(), *(func.sum(column) for column in _TOKENS)]
        query = select(*groups, *_PRICES, *sums).where(wanted.condition())
        query = query.group_by(*groups, *_PRICES)
        if max_rows is not None:
            query = query.limit(max_rows + 1)
        with translated(), self._engine.connect() as connection:
            rows = connection.execute(query).all()
        if max_rows is not None and len(rows) > max_rows:
            raise TooManyRows
        return [_priced(groupings, row) for row in rows]

    def spent(self, of: SpendId) -> dict[str, Decimal]:
        """Return what a key or a tenant has spent in a period, in USD, by the recording ingress.

        It is the exact sum of their records. The tables are migrated first, because those of an
        older version have no sums.
        """
        self.prepare()
        columns = spend.c
        owner = columns.key_id if of.owner is Owner.KEY else columns.tenant
        wanted = owner == of.name
        if of.start is not None and of.end is not None:
            wanted = and_(wanted, columns.day >= of.start, columns.day < of.end)
        group = [columns.ingress, *(columns[price.name] for price in _PRICES)]
        sums = [func.sum(columns[tokens.name]) for tokens in _TOKENS]
        with translated(), self._engine.connect() as connection:
            rows = connection.execute(select(*group, *sums).where(wanted).group_by(*group)).all()
        parts: dict[str, Decimal] = {}
        for ingress, *row in rows:
            prices = Prices(*with_former_prices(row[: len(_PRICES)]))
            cost = prices.cost(TokenUsage(*map(int, row[len(_PRICES) :])))
            parts[ingress] = EXACT.add(parts.get(ingress, Decimal(0)), cost)
        return parts


def _group_value(value: object) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


def _priced(groupings: Sequence[Grouping], row: Sequence[Any]) -> Priced:
    """Return what a row of groups, prices and sums says."""
    group = {one.value: _group_value(value) for one, value in zip(groupings, row, strict=False)}
    values = row[len(groupings) :]
    priced, (requests, *sums) = values[: len(_PRICES)], values[len(_PRICES) :]
    prices = None if priced[0] is None else Prices(*with_former_prices(priced))
    return Priced(group, requests, prices, TokenUsage(*map(int, sums)))


_columns = usage_records.c
_GROUPS: Final = {
    Grouping.DAY: _columns.day,
    Grouping.HOUR: hour_of(_columns.arrived),
    Grouping.MINUTE: minute_of(_columns.arrived),
    Grouping.TENANT: _columns.tenant,
    Grouping.KEY: _columns.key_id,
    Grouping.MODEL: _columns.model,
    Grouping.TIER: _columns.served_tier,
    Grouping.STATE: _columns.state,
    Grouping.ESTIMATED: _columns.usage_estimated,
}
_PRICES: Final = tuple(_columns[name] for name in PRICES)
_DEFAULTS: Final = {
    "usage_estimated": "false", "ingress": "''", "cache_write_tokens": "0", "images": "0",
    "audio_seconds": "0",
}  # fmt: skip
_TOKENS: Final = tuple(_columns[name] for name in USED)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter of records; ``None`` does not restrict.

    Attributes:
        tenant: only this tenant.
        since: the first day.
        until: the day after the last.
        model: only this model.
        key: only the key with this id.
        tier: only requests that were served at this tier.
        requests: only the requests with these ids.
        arrived: only requests that arrived from the first time until before the second, in UTC.
        tenants, models, keys, routes: only these.
        served: only requests that reached an engine.
    """

    tenant: str | None = None
    since: date | None = None
    until: date | None = None
    model: str | None = None
    key: str | None = None
    tier: Tier | None = None
    requests: tuple[str, ...] | None = None
    arrived: tuple[datetime, datetime] | None = None
    tenants: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    keys: tuple[str, ...] | None = None
    routes: tuple[str, ...] | None = None
    served: bool = False

    def condition(self) -> ColumnElement[bool]:
        """Return the SQL condition of the filter."""
        columns = usage_records.c
        conditions = [
            None if self.tenant is None else columns.tenant == self.tenant,
            None if self.since is None else columns.day >= self.since,
            None if self.until is None else columns.day < self.until,
            None if self.model is None else columns.model == self.model,
            None if self.key is None else columns.key_id == self.key,
            None if self.tier is None else columns.served_tier == self.tier.value,
            None if not self.served else columns.served_tier.is_not(None),
        ]
        for column, values in (
            (columns.request_id, self.requests),
            (columns.tenant, self.tenants),
            (columns.model, self.models),
            (columns.key_id, self.keys),
            (columns.route, self.routes),
        ):
            conditions.append(None if values is None else column.in_(values))
        if self.arrived is not None:
            start, end = self.arrived
            conditions += [columns.arrived >= start, columns.arrived < end]
            # There is an index of the days.
            conditions += [columns.day >= start.date(), columns.day <= end.date()]
        return and_(True, *(each for each in conditions if each is not None))


def insert_statement(dialect: str) -> TextClause:
    """Return the statement that writes a batch of records, a JSON array in ``:batch``."""
    names = [column.name for column in usage_records.c if column.name != "day"]
    entries = ""
    if dialect == "sqlite":
        values = ", ".join(_or_default(name, f"json_extract(value, '$.{name}')") for name in names)
        source = f"{values}, substr(json_extract(value, '$.arrived'), 1, 10) FROM entries"
        # SQLite would write each record's JSON anew for every column that is extracted from it:
        # 40 us for a record instead of 14.
        entries = "WITH entries AS MATERIALIZED (SELECT value FROM json_each(:batch)) "
        # Without a WHERE, SQLite parses ON CONFLICT as the ON of a join.
        source += " WHERE true"
    else:
        typed = ", ".join(f"{name} {_postgresql_type(name)}" for name in names)
        values = ", ".join(_or_default(name, name) for name in names)
        source = (
            f"{values}, (arrived AT TIME ZONE 'UTC')::date "
            f"FROM json_to_recordset(CAST(:batch AS json)) AS entry({typed})"
        )
    return text(
        f"{entries}INSERT INTO usage_records ({', '.join(names)}, day) SELECT {source} "
        "ON CONFLICT (request_id) DO NOTHING"
    )


def _or_default(name: str, value: str) -> str:
    # Older records lack these fields, and NULL would be rejected.
    default = _DEFAULTS.get(name)
    return value if default is None else f"coalesce({value}, {default})"


def _postgresql_type(name: str) -> str:
    kind = usage_records.c[name].type
    if isinstance(kind, Amount):
        return "numeric"
    if isinstance(kind, Moment):
        return "timestamptz"
    if isinstance(kind, Boolean):
        return "boolean"
    if isinstance(kind, Float):
        return "double precision"
    return "bigint" if isinstance(kind, Integer) else "text"
