"""A store in memory that can be away, for tests of what stands before it."""

from __future__ import annotations

from app.ledger.record import UsageRecord, fields_from_json
from app.store.database import StoreAway


class MemoryStore:
    """Keeps the first record of each request, as the real one does."""

    def __init__(self) -> None:
        self.away = False
        self.lose_answer = False
        self.records: dict[str, UsageRecord] = {}

    def prepare(self) -> None:
        self._reach()

    def add(self, bodies: list[bytes]) -> None:
        self._reach()
        for body in bodies:
            record = UsageRecord.from_fields(fields_from_json(body))
            self.records.setdefault(record.origin.request_id, record)
        if self.lose_answer:
            # Written, and nobody knows.
            raise StoreAway("connection lost")

    def _reach(self) -> None:
        if self.away:
            raise StoreAway("away")
