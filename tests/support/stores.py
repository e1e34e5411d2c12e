"""A store in memory that can be away, for tests of what stands before it."""

from __future__ import annotations

import math
import time
from pathlib import Path

from app.ledger.adoption import Adopter
from app.ledger.reading import read_record
from app.ledger.record import UsageRecord
from app.store.database import StoreAway, StoreRefuses


class MemoryStore:
    """Keeps the first record of each request, as the real one does."""

    def __init__(self) -> None:
        self.away = False
        self.lose_answer = False
        # After so many more transactions it is away.
        self.left = math.inf
        self.records: dict[str, UsageRecord] = {}
        # Request ids whose records it does not take.
        self.refuses: set[str] = set()

    def prepare(self) -> None:
        self._reach()

    def add(self, bodies: list[bytes]) -> None:
        self._reach()
        self.left -= 1
        records = [read_record(body) for body in bodies]
        if any(record.origin.request_id in self.refuses for record in records):
            raise StoreRefuses("no")
        for record in records:
            self.records.setdefault(record.origin.request_id, record)
        if self.lose_answer:
            # Written, and nobody knows.
            raise StoreAway("connection lost")

    def _reach(self) -> None:
        if self.away or self.left <= 0:
            raise StoreAway("away")


def adopt(folder: Path, store: MemoryStore) -> int:
    """Adopt journals once, those set aside unread too, and count the records."""
    return Adopter(folder, store).adopt(time.monotonic())
