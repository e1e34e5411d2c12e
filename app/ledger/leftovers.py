"""The records in the journal of a dead ingress, as they go to the store. Pure.

An unreadable entry does not affect other requests. The request that it belongs to is not settled
from its other entries: the missing entry may be its end, and the store keeps the first record that
it gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from app.ledger.codec import Frame, Kind, Progress
from app.ledger.reading import NotUnderstood, read_record, request_of
from app.ledger.record import State, UsageRecord

INGRESS_LOST: Final = "ingress_lost"
"""The reason of a record whose ingress died while it was open."""


class Leftovers:
    """The records of one journal.

    Attributes:
        unread: the errors of unreadable entries; complete once ``settled`` is exhausted.
    """

    def __init__(self) -> None:
        self.unread: list[str] = []
        self._opened: dict[str, UsageRecord] = {}
        self._progress: dict[str, Progress] = {}
        self._withheld: set[str] = set()

    def settled(self, frames: Iterable[Frame]) -> Iterator[bytes]:
        """Yield the JSON of every record, in no particular order.

        Open requests become interrupted, with the usage of their last written progress.
        """
        for found in frames:
            try:
                body = self._read(found)
            except NotUnderstood as why:
                self._withhold(request_of(found.body), why)
            else:
                if body is not None:
                    yield body
        for request_id in self._opened.keys() - self._withheld:
            try:
                yield self._interrupted(request_id).to_json()
            except (ValueError, ArithmeticError) as why:
                self._withhold(request_id, why)

    def _read(self, found: Frame) -> bytes | None:
        """Process an entry; return its body if it is a settled record."""
        if found.kind is None:
            raise NotUnderstood("it is of a kind that is unknown here")
        if found.kind in (Kind.PROGRESS, Kind.ESTIMATE, Kind.DETAILED):
            step = Progress.of(found)
            self._progress[step.request_id] = step
            return None
        record = read_record(found.body)
        if (record.state is State.OPEN) is not (found.kind is Kind.OPEN):
            raise NotUnderstood("its state is not that of its kind")
        request_id = record.origin.request_id
        if found.kind is Kind.OPEN:
            self._opened[request_id] = record
            return None
        self._opened.pop(request_id, None)
        return found.body

    def _withhold(self, request_id: str | None, why: Exception) -> None:
        self.unread.append(str(why))
        if request_id is not None:
            self._withheld.add(request_id)

    def _interrupted(self, request_id: str) -> UsageRecord:
        """Return the interrupted record of a request that was open when its ingress was lost."""
        record, step = self._opened[request_id], self._progress.get(request_id)
        return record.settle(
            State.INTERRUPTED,
            record.usage if step is None else step.usage,
            ended=record.origin.arrived if step is None else step.at,
            reason=INGRESS_LOST,
            estimated=record.usage_estimated if step is None else step.estimated,
        )
