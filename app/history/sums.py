"""Sums the traffic of one model over ingresses that come and go. Pure."""

from __future__ import annotations

from typing import Final

from app.contracts.traffic import Traffic

MOST_INGRESSES: Final = 256
"""How many ingresses are kept apart, living or gone. Each takes up to 10 KB. Beyond that, the one
that has been silent for longest is counted as gone for good; if it did report again, it would be
counted twice."""
SETTLING_S: Final = 10.0
"""How long after the start of a Model an ingress that it has not heard of counts as older than the
Model. Ingresses find a new Model within ``discovery_interval_s``, two seconds by default."""


class TrafficSums:
    """The traffic of every ingress since that ingress started. No sum ever falls.

    Args:
        now: the time, in seconds, at which the Model starts.
    """

    def __init__(self, now: float) -> None:
        self._started = now
        # In the order of their last reports: the first has been silent for longest.
        self._latest: dict[str, Traffic] = {}
        self._gone = Traffic()
        self._before = Traffic()

    def take(self, ingress: str, traffic: Traffic, now: float) -> None:
        """Record the counts of an ingress; lost and repeated reports do no harm."""
        if self._latest.pop(ingress, None) is None and now - self._started < SETTLING_S:
            self._before.join(traffic)
        self._latest[ingress] = traffic
        if len(self._latest) > MOST_INGRESSES:
            self._gone.join(self._latest.pop(next(iter(self._latest))))

    def __len__(self) -> int:
        """How many ingresses are kept apart."""
        return len(self._latest)

    def total(self) -> Traffic:
        """Return the counts of all ingresses that this Model has heard of, living or gone."""
        return Traffic.of([self._gone, *self._latest.values()])

    def grown(self, total: Traffic) -> Traffic:
        """Return what ``total`` has counted since this Model started.

        What an older ingress had counted before is left out, so that differences are true rates.
        """
        return total.since(self._before)
