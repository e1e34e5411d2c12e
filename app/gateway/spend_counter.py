"""Adds what requests have cost to the spend of their keys and tenants."""

from __future__ import annotations

from app.observe.observers import Ended, Refused
from app.tenants.budget_gate import BudgetGate


class SpendCounter:
    """Observes requests, and tells the budgets what each has cost."""

    def __init__(self, budgets: BudgetGate) -> None:
        self._budgets = budgets

    def ended(self, request: Ended) -> None:
        """Add the cost of a request to a known model."""
        record = request.record
        origin = record.origin
        if origin.key_id:
            self._budgets.add(origin.key_id, origin.tenant, origin.arrived.date(), record.cost)

    def refused(self, request: Refused) -> None:
        """Do nothing: it costs nothing."""
