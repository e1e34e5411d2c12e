"""Counts the requests of an ingress by model, for metrics and for reports to the Models."""

from __future__ import annotations

from app.contracts.traffic import Outcome, Served, Traffic
from app.ledger.record import UsageRecord
from app.observe.observers import Ended, Refused


class Tallies:
    """Observes requests, and keeps counts of them.

    Attributes:
        models: what has happened to the requests of each model, by its id.
        refused_requests: how many requests were refused before their model was known, by route,
            status and reason.
    """

    def __init__(self) -> None:
        self.models: dict[str, Traffic] = {}
        self.refused_requests: dict[tuple[str, int, str], int] = {}

    def ended(self, request: Ended) -> None:
        """Count a request to a known model."""
        record = request.record
        outcome = Outcome(record.origin.requested, record.served, record.state.value, record.reason)
        self.of(record.origin.base_model).add(outcome, _served(record))

    def refused(self, request: Refused) -> None:
        """Count a request that was refused before its model was known."""
        key = (request.route, request.status, request.reason)
        self.refused_requests[key] = self.refused_requests.get(key, 0) + 1

    def of(self, model: str) -> Traffic:
        """Return the counts of one model."""
        traffic = self.models.get(model)
        if traffic is None:
            traffic = self.models[model] = Traffic()
        return traffic


def _served(record: UsageRecord) -> Served | None:
    duration_s = record.duration_s
    if record.served is None or duration_s is None:
        return None
    return Served(
        record.origin.stream,
        record.queue_s,
        record.ttft_s,
        duration_s,
        record.usage,
        record.cost,
        record.usage_estimated,
    )
