"""The latest report of every ingress, as the Model keeps them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from app.contracts.credits import Demand
from app.contracts.stats import IngressBoard, QueueReport
from app.flow.credits import SILENCE_S


@dataclass(slots=True)
class _Entry:
    board: IngressBoard
    heard: float


class ReportStore:
    """The latest word of every ingress. Kept by its Model actor."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def take(self, demand: Demand, report: QueueReport | None, now: float) -> None:
        """Take note of a renewal, with or without a report.

        An ingress is on the board once it has reported: where the Model was just started that
        takes up to ``REPORT_S``.
        """
        entry = self._entries.get(demand.ingress)
        if entry is not None:
            entry.board = IngressBoard(demand, report or entry.board.report)
            entry.heard = now
        elif report is not None:
            # Here too, lest the ingresses of years pile up where nobody ever looks.
            self._forget_silent(now)
            self._entries[demand.ingress] = _Entry(IngressBoard(demand, report), now)

    def ingresses(self, now: float) -> tuple[IngressBoard, ...]:
        """Return every ingress that was heard within ``SILENCE_S``, by name."""
        self._forget_silent(now)
        return tuple(entry.board for _, entry in sorted(self._entries.items()))

    def _forget_silent(self, now: float) -> None:
        entries = self._entries
        for name in [name for name, one in entries.items() if now - one.heard >= SILENCE_S]:
            del entries[name]
