"""How a model's queue behaves, as its operator set it."""

from __future__ import annotations

import math

from pydantic import Field

from app.core.settings import Settings
from app.core.tiers import Tier

# While no engine is ready some requests may wait all the same: their waiting brings one up.
_LEAST_WAITING = 64


def headroom_of(share: float, slots: int) -> int:
    """Return how many of so many slots are kept free for priority, by a queue's ``headroom``."""
    return min(math.ceil(share * slots), slots // 2)


class TierQueue(Settings):
    """How long requests of one tier may wait, and how many."""

    max_waiting: int | None = Field(
        default=None,
        ge=0,
        description="The queue is full for this tier once so many requests wait in it, of "
        "whatever tier, at all ingresses together. Never counted as less than for a lower tier. "
        "Not set: 16 times the model's slots for flex, 24 times for default, 32 times for "
        "priority (64 at least at each ingress), so that a queue that fills up refuses flex "
        "first and keeps room for priority.",
    )
    reserved: int | None = Field(
        default=None,
        ge=0,
        description="So many requests of this tier, at all ingresses together, may wait however "
        "full the queue is, and are not displaced, so that the starvation guard finds somebody to "
        "serve. Not set: a sixteenth of `max_waiting`.",
    )
    max_wait_s: float = Field(
        default=120.0,
        gt=0,
        description="Longest wait in the queue, in seconds; then the request is shed. Two minutes "
        "by default: the OpenAI SDKs give up after ten, and an answer must still fit.",
    )
    starvation_age_s: float = Field(
        default=30.0,
        ge=0,
        description="Once its oldest request has waited so long, in seconds, a tier below "
        "priority gets every `starvation_every`-th grant. A quarter of the longest wait by "
        "default: time enough for such grants to matter. Without meaning for priority.",
    )


class QueueSettings(Settings):
    """The queue of one model. Changes need no restart, and hold for requests that wait."""

    priority: TierQueue = Field(default=TierQueue(), description="Waiting at priority.")
    default: TierQueue = Field(default=TierQueue(), description="Waiting at default.")
    flex: TierQueue = Field(
        default=TierQueue(max_wait_s=600.0, starvation_age_s=150.0),
        description="Waiting at flex: up to ten minutes, which is what its lower price is for.",
    )
    headroom: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Share of a model's slots that are kept free for priority, rounded up, but "
        "never more than half. A tenth is one of eight slots and 26 of 256: it covers a burst "
        "of priority requests, and costs large batches little throughput.",
    )
    starvation_every: int = Field(
        default=10,
        ge=2,
        description="Every how manieth grant goes to a starving lower tier. Ten costs priority a "
        "tenth of the grants at the worst.",
    )
    affinity_slack: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="A request goes to the replica that its prompt's beginning belongs to as "
        "long as that is busier than the least busy one by no more than this share of its "
        "slots. A quarter keeps prefix caches warm without piling work on one replica. 0 with "
        "equal load only.",
    )
    drain_window_s: float = Field(
        default=30.0,
        gt=0,
        description="Over how many seconds the rate of grants is measured that `Retry-After` is "
        "computed from: long enough to hold several answers, short enough to follow the load.",
    )
    min_retry_after_s: float = Field(
        default=1.0,
        gt=0,
        description="Shortest `Retry-After`, in seconds, so that a refused client does not spin.",
    )
    max_retry_after_s: float = Field(
        default=60.0,
        gt=0,
        description="Longest `Retry-After`, in seconds; also said where nothing was granted "
        "lately. The OpenAI SDKs do not wait for longer.",
    )

    def of(self, tier: Tier) -> TierQueue:
        """Return what holds for one tier."""
        if tier is Tier.DEFAULT:
            return self.default
        return self.priority if tier is Tier.PRIORITY else self.flex

    def headroom_of(self, slots: int) -> int:
        """Return how many of so many slots are kept free for priority."""
        return headroom_of(self.headroom, slots)

    def bounds(self, *, slots: int, ingresses: int) -> dict[Tier, int]:
        """Return from how many waiting requests on one ingress's queue is full, by tier.

        Args:
            slots: the model's slots, of all its replicas.
            ingresses: how many ingresses share them, at least 1.
        """
        bounds: dict[Tier, int] = {}
        least = 0
        for tier in reversed(Tier):
            derived = max(_WAITING_PER_SLOT[tier] * slots, _LEAST_WAITING * ingresses)
            bound = _each(self.of(tier).max_waiting, derived, ingresses)
            least = bounds[tier] = max(bound, least)
        return bounds

    def reserved(self, *, slots: int, ingresses: int) -> dict[Tier, int]:
        """Return how many requests may wait on one ingress's full queue, by tier."""
        bounds = self.bounds(slots=slots, ingresses=ingresses)
        return {
            tier: _each(self.of(tier).reserved, bounds[tier] * ingresses // 16, ingresses)
            for tier in Tier
        }


_WAITING_PER_SLOT = {Tier.PRIORITY: 32, Tier.DEFAULT: 24, Tier.FLEX: 16}


def _each(wanted: int | None, derived: int, ingresses: int) -> int:
    return math.ceil((derived if wanted is None else wanted) / ingresses)
