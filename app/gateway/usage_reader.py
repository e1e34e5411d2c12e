"""Reads usage for requests, within bounds.

It has threads and database connections of its own, so that it delays neither records nor keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from threading import Lock
from typing import TypeVar

from sqlalchemy import URL

from app.config.usage_reads import UsageSettings
from app.core import errors
from app.core.holdings import Holding, Holdings
from app.ledger.record import UsageRecord
from app.ledger.record_store import Place, RecordStore, Wanted
from app.ledger.usage import Grouping, Priced, Total
from app.store.database import connect

_T = TypeVar("_T")


class _Reader(Enum):
    """Whose queries a bound counts."""

    TENANT = auto()
    INGRESS = auto()


class UsageReader:
    """The usage queries of one ingress, with their own threads and database connections."""

    def __init__(self, store: URL, settings: UsageSettings) -> None:
        self.settings = settings
        self._engine = connect(
            store, connections=settings.max_reads, statement_timeout_s=settings.timeout_s
        )
        self._records = RecordStore(self._engine)
        self._threads = ThreadPoolExecutor(settings.max_reads, "usage")
        # Guards `_reading`: queries end on other threads.
        self._lock = Lock()
        self._reading: Holdings[_Reader] = Holdings()

    async def totals(self, wanted: Wanted, groups: Sequence[Grouping]) -> list[Total]:
        """Return totals of a tenant's records.

        A query continues after its client has disconnected, and counts until it has ended.

        Raises:
            UsageBusy: the maximum number of queries is running, here or for this tenant.
            StoreTooSlow: the query took too long and was cancelled.
            StoreAway: the database cannot be read.
            TooManyRows: there are more groups than ``max_rows``.
        """
        most = self.settings.max_rows
        return await self._read(wanted, lambda: self._records.totals(wanted, groups, most))

    async def priced(self, wanted: Wanted, groups: Sequence[Grouping]) -> list[Priced]:
        """Return the usage of each group and each set of prices.

        Raises:
            UsageBusy, StoreTooSlow, StoreAway, TooManyRows: see ``totals``.
        """
        most = self.settings.max_rows
        return await self._read(wanted, lambda: self._records.priced(wanted, groups, most))

    async def latest(
        self, wanted: Wanted, most: int, before: Place | None = None
    ) -> list[UsageRecord]:
        """Return at most so many of a tenant's records, the latest first.

        Raises:
            UsageBusy, StoreTooSlow, StoreAway: see ``totals``.
        """
        return await self._read(wanted, lambda: self._records.latest(wanted, most, before))

    async def _read(self, wanted: Wanted, read: Callable[[], _T]) -> _T:
        holding = self._enter(wanted.tenant or "")
        reading = self._threads.submit(read)
        reading.add_done_callback(lambda _: self._leave(holding))
        return await asyncio.wrap_future(reading)

    def close(self) -> None:
        """Wait for running queries, and close the connections. May block."""
        self._threads.shutdown()
        self._engine.dispose()

    def _enter(self, tenant: str) -> Holding[_Reader]:
        holding = Holding(self._reading, (_Reader.TENANT, tenant), (_Reader.INGRESS, ""))
        with self._lock:
            bounds = (self.settings.max_reads_per_tenant, self.settings.max_reads)
            if holding.grow(1, *bounds) is not None:
                raise errors.UsageBusy
        return holding

    def _leave(self, holding: Holding[_Reader]) -> None:
        with self._lock:
            holding.give_back()
