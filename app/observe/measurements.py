"""Measures requests as OpenTelemetry's conventions for GenAI servers define it.

``Tallies`` counts by served tier, for reports to the Models. Here times are kept by operation,
requested and served tier and error, which only this ingress's own metrics need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from app.contracts.traffic import (
    DURATION_BOUNDS_S,
    PER_TOKEN_BOUNDS_S,
    TTFT_BOUNDS_S,
    Histogram,
    seconds_per_token,
)
from app.core.dialect import Route
from app.core.tier_decision import without_raise
from app.core.tiers import AUTO, Tier
from app.ledger.record import State, UsageRecord
from app.observe.catalogue import DURATION, PER_TOKEN, TTFT
from app.observe.exporter import Sample
from app.observe.observers import Ended, Refused
from app.observe.operations import PROVIDER, operation_of


class Key(NamedTuple):
    """What requests are told apart by; the record's own values, to be quick.

    Attributes:
        route: the path below ``/v1/``.
        model: the model's id.
        requested: the requested tier; ``None`` for none.
        served: the served tier; ``None`` if no engine received it.
        error: why there is no whole answer; ``None`` if there is one.
    """

    route: str
    model: str
    requested: Tier | None
    served: Tier | None
    error: str | None

    @property
    def labels(self) -> tuple[str, ...]:
        """The values of the labels that OpenTelemetry's metrics have."""
        return (
            operation_of(self.route),
            PROVIDER,
            self.model,
            AUTO if self.requested is None else self.requested.value,
            "" if self.served is None else self.served.value,
            self.error or "",
        )


@dataclass(slots=True)
class Times:
    """The times of requests with one key; ``ttft`` and ``per_token`` of whole streams only."""

    duration: Histogram = field(default_factory=lambda: Histogram(DURATION_BOUNDS_S))
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    per_token: Histogram = field(default_factory=lambda: Histogram(PER_TOKEN_BOUNDS_S))

    def add(self, record: UsageRecord, duration_s: float) -> None:
        """Count one request."""
        self.duration.add(duration_s)
        if record.state is State.COMPLETED and record.origin.stream and record.ttft_s is not None:
            self.ttft.add(record.ttft_s)
            tokens = record.usage.completion_tokens
            if (pace_s := seconds_per_token(duration_s, record.ttft_s, tokens)) is not None:
                self.per_token.add(pace_s)


class Measurements:
    """Observes requests, and keeps their times."""

    def __init__(self) -> None:
        self._times: dict[Key, Times] = {}

    def ended(self, request: Ended) -> None:
        """Measure a request to a known model."""
        record = request.record
        origin, duration_s = record.origin, record.duration_s
        error = None
        if record.state is not State.COMPLETED:
            error = without_raise(record.reason) or record.state.value
        if duration_s is not None:
            key = Key(origin.route, origin.model, origin.requested, record.served, error)
            self._of(key).add(record, duration_s)

    def refused(self, request: Refused) -> None:
        """Do nothing: its model is not known. ``Tallies`` counts it."""

    def samples(self, models: Iterable[str]) -> Iterator[Sample]:
        """Yield every histogram; chats of ``models`` are there before the first one."""
        for model in models:
            for tier in Tier:
                self._of(Key(Route.CHAT.value, model, tier, tier, None))
        for key, times in self._times.items():
            labels = key.labels
            yield Sample(DURATION, labels, times.duration)
            if key.served is not None and key.error is None:
                yield Sample(TTFT, labels, times.ttft)
                yield Sample(PER_TOKEN, labels, times.per_token)

    def _of(self, key: Key) -> Times:
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = Times()
        return times
