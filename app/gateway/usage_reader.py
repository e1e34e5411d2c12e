"""Reads usage for requests, within bounds, and apart from what records and keys need."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from threading import Lock

from sqlalchemy import URL

from app.config.usage_reads import UsageSettings
from app.core import errors
from app.core.holdings import Holding, Holdings
from app.ledger.record_store import RecordStore, Wanted
from app.ledger.usage import Grouping, Total
from app.store.database import connect


class _Reader(Enum):
    """Whose readings a bound counts."""

    TENANT = auto()
    INGRESS = auto()


class UsageReader:
    """The readings of one ingress; they have threads and database connections of their own."""

    def __init__(self, store: URL, settings: UsageSettings) -> None:
        self.settings = settings
        self._engine = connect(
            store, connections=settings.max_reads, statement_timeout_s=settings.timeout_s
        )
        self._records = RecordStore(self._engine)
        self._threads = ThreadPoolExecutor(settings.max_reads, "usage")
        # Readings end on threads.
        self._lock = Lock()
        self._reading: Holdings[_Reader] = Holdings()

    async def totals(self, wanted: Wanted, groups: Sequence[Grouping]) -> list[Total]:
        """Return totals of a tenant's records.

        A reading goes on after its client has left, and counts until it has ended.

        Raises:
            UsageBusy: as many are under way as may be, here or for this tenant.
            StoreTooSlow: the database was stopped, since it took too long.
            StoreAway: the database cannot be read.
            TooManyRows: there would be more groups than may be.
        """
        place = self._enter(wanted.tenant or "")
        reading = self._threads.submit(self._records.totals, wanted, groups, self.settings.max_rows)
        reading.add_done_callback(lambda _: self._leave(place))
        return await asyncio.wrap_future(reading)

    def close(self) -> None:
        """Wait for what is being read, and close the connections; may block."""
        self._threads.shutdown()
        self._engine.dispose()

    def _enter(self, tenant: str) -> Holding[_Reader]:
        place = Holding(self._reading, (_Reader.TENANT, tenant), (_Reader.INGRESS, ""))
        with self._lock:
            bounds = (self.settings.max_reads_per_tenant, self.settings.max_reads)
            if place.grow(1, *bounds) is not None:
                raise errors.UsageBusy
        return place

    def _leave(self, place: Holding[_Reader]) -> None:
        with self._lock:
            place.give_back()
