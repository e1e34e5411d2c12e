"""Counts the requests of an ingress by model, for metrics and for reports to the Models."""

from __future__ import annotations

from dataclasses import dataclass

from app.contracts.traffic import Outcome, Served, Traffic
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.ledger.record import UsageRecord
from app.observe.observers import Ended, Refused


@dataclass(slots=True)
class Extras:
    """What is billed besides prompt, cached and generated tokens, summed over requests.

    It is not part of ``Traffic``, which the Models get: only metrics show it.

    Attributes:
        cache_write_tokens: the prompt tokens that were written to prefix caches.
        images: the images of prompts.
        audio_seconds: the seconds of recordings.
    """

    cache_write_tokens: int = 0
    images: int = 0
    audio_seconds: int = 0

    def add(self, usage: TokenUsage) -> None:
        """Count one request."""
        self.cache_write_tokens += usage.cache_write_tokens
        self.images += usage.images
        self.audio_seconds += usage.audio_seconds


NO_EXTRAS = Extras()


class Tallies:
    """Observes requests, and keeps counts of them.

    Attributes:
        models: what has happened to the requests of each model, by its id.
        refused_requests: how many requests were refused before their model was known, by route,
            status and reason.
        extras: what was billed besides tokens, by the model's id and the served tier.
    """

    def __init__(self) -> None:
        self.models: dict[str, Traffic] = {}
        self.refused_requests: dict[tuple[str, int, str], int] = {}
        self.extras: dict[tuple[str, Tier], Extras] = {}

    def ended(self, request: Ended) -> None:
        """Count a request to a known model."""
        record = request.record
        outcome = Outcome(record.origin.requested, record.served, record.state.value, record.reason)
        served, model = _served(record), record.origin.base_model
        self.of(model).add(outcome, served)
        if served is not None and record.served is not None and served.usage.has_extras:
            self.extras.setdefault((model, record.served), Extras()).add(served.usage)

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
