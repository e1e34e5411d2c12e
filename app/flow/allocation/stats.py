"""Stores the latest report of every ingress, for the Model. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from app.contracts.credits import Demand
from app.contracts.stats import IngressBoard, QueueReport
from app.flow.credits import SILENCE_S


@dataclass(slots=True)
class _Entry:
    board: IngressBoard
    renewed_at: float


class ReportStore:
    """The latest demand and report of every ingress. Owned by the Model actor."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def take(self, demand: Demand, report: QueueReport | None, now: float) -> None:
        """Record a renewal, with or without a report.

        An ingress is listed once it has reported. After a start of the Model that takes up to
        ``REPORT_S``.
        """
        entry = self._entries.get(demand.ingress)
        if entry is not None:
            entry.board = IngressBoard(demand, report or entry.board.report)
            entry.renewed_at = now
        elif report is not None:
            # Here too: otherwise dead ingresses pile up if ``ingresses`` is never called.
            self._forget_silent(now)
            self._entries[demand.ingress] = _Entry(IngressBoard(demand, report), now)

    def ingresses(self, now: float) -> tuple[IngressBoard, ...]:
        """Return every ingress that has renewed within ``SILENCE_S``, sorted by name."""
        self._forget_silent(now)
        return tuple(entry.board for _, entry in sorted(self._entries.items()))

    def _forget_silent(self, now: float) -> None:
        entries = self._entries
        for name in [name for name, one in entries.items() if now - one.renewed_at >= SILENCE_S]:
            del entries[name]
