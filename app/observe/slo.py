"""Counts which requests meet the objective of their tier (``slo`` in a model's settings)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from app.config.slo import SloSettings
from app.core.tier_decision import is_raised
from app.core.tiers import Tier
from app.ledger.record import State, UsageRecord
from app.observe.observers import Ended, Refused
from app.observe.tallies import Tallies

LIMITS: Final = frozenset(
    {"rate_limit_exceeded", "concurrency_limit_exceeded", "insufficient_quota"}
)
"""Why requests are refused that exceed a limit of their key, or a budget."""
_REJECTED: Final = "engine_rejected"


class SloWatch:
    """Observes requests, and counts in their model's ``Traffic`` whether they met the objective.

    Args:
        slo_of: returns the objectives of a model, by its id; ``None`` if it is not known.
        tallies: where it is counted.
    """

    def __init__(self, slo_of: Callable[[str], SloSettings | None], tallies: Tallies) -> None:
        self._slo_of = slo_of
        self._tallies = tallies

    def ended(self, request: Ended) -> None:
        """Count a request to a known model."""
        record = request.record
        model = record.origin.base_model
        slo = self._slo_of(model)
        tier = record.served or record.origin.requested or Tier.DEFAULT
        if slo is None or (target := slo.of(tier)) is None:
            return
        met = judge(record, target.ttft_ms / 1000)
        if met is not None:
            self._tallies.of(model).attain(tier, met=met)

    def refused(self, request: Refused) -> None:
        """Do nothing: its model is not known."""


def judge(record: UsageRecord, ttft_s: float) -> bool | None:
    """Return whether a stream met a time to first byte; ``None`` if it says nothing about that.

    A stream that got no first byte counts as missed, unless its client or its key was the reason.
    One that was raised to a better tier has waited at another tier, as long as its client allowed.
    """
    if not record.origin.stream or is_raised(record.reason):
        return None
    if record.ttft_s is not None:
        return record.ttft_s <= ttft_s
    if record.state is State.INTERRUPTED:
        # The client has left. Had it waited for longer than the objective already?
        return False if (record.duration_s or 0.0) > ttft_s else None
    if record.state is State.COMPLETED or record.reason in LIMITS or record.reason == _REJECTED:
        return None
    return False
