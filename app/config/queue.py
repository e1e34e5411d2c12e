"""Settings of a model's queue."""

from __future__ import annotations

import math

from pydantic import Field

from app.core.settings import Settings
from app.core.tiers import Tier

# Some requests may wait even while no engine is ready: waiting requests start one.
_LEAST_WAITING = 64
_HEADROOM = 0.1


def headroom_of(share: float, slots: int) -> int:
    """Return how many of ``slots`` stay free for priority; ``share`` is a queue's ``headroom``."""
    return min(math.ceil(share * slots), slots // 2)


class TierQueue(Settings):
    """How many requests of one tier may wait, and for how long."""

    max_waiting: int | None = Field(
        default=None,
        ge=0,
        description="The queue is full for this tier once this many requests of any tier wait in "
        "it, over all ingresses. It is never less than for a lower tier. Not set: 16 times the "
        "model's slots for flex, 24 times for default, 32 times for priority (at least 64 at each "
        "ingress). A queue that fills up thus rejects flex first and keeps room for priority.",
    )
    reserved: int | None = Field(
        default=None,
        ge=0,
        description="This many requests of the tier, over all ingresses, may wait however full "
        "the queue is, and are not displaced. The starvation guard thus finds a request to serve. "
        "Not set: a sixteenth of `max_waiting`.",
    )
    max_wait_s: float = Field(
        default=120.0,
        gt=0,
        description="Longest wait in the queue, in seconds; then the request is shed. Two minutes "
        "by default: the OpenAI SDKs give up after ten, and the answer must still fit.",
    )
    starvation_age_s: float = Field(
        default=30.0,
        ge=0,
        description="A tier below priority is starving once its oldest request has waited this "
        "long, in seconds. It then gets every `starvation_every`-th slot. The default is a "
        "quarter of the longest wait, early enough for those slots to matter. Without effect for "
        "priority.",
    )


class QueueSettings(Settings):
    """The queue of one model. Changes need no restart, and apply to waiting requests too."""

    priority: TierQueue = Field(
        default=TierQueue(), description="Bounds for waiting priority requests."
    )
    default: TierQueue = Field(
        default=TierQueue(), description="Bounds for waiting default requests."
    )
    flex: TierQueue = Field(
        default=TierQueue(max_wait_s=600.0, starvation_age_s=150.0),
        description="Bounds for waiting flex requests: up to ten minutes, which the lower price "
        "is for.",
    )
    headroom: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        description="Share of a model's slots that is kept free for priority, rounded up, but "
        "never more than half. Not set: a tenth, but none on replicas whose engine preempts, where "
        "priority needs no free slot. A tenth is one of eight slots and 26 of 256. It covers a "
        "burst of priority requests, and costs large batches little throughput. A number applies "
        "to all replicas.",
    )
    starvation_every: int = Field(
        default=10,
        ge=2,
        description="While a lower tier is starving, it gets every Nth free slot. At the default "
        "of 10, priority loses at most 10 % of the slots.",
    )
    inputs_per_slot: int = Field(
        default=32,
        gt=0,
        description="How many inputs of an embeddings request, or texts to rank, take one slot. "
        "An input is one step of prefill and no sequence that stays in the engine, so ordinary "
        "batches need not wait for each other. With the default, a batch of 100 inputs takes 4 "
        "slots, and one of 2,048, the most in OpenAI's API, takes 64.",
    )
    affinity_slack: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="A request goes to the replica that owns its prompt's prefix, unless that "
        "replica is busier than the least busy one by more than this share of its slots. A "
        "quarter keeps prefix caches warm without piling work on one replica. With 0, it goes "
        "there at equal load only.",
    )
    drain_window_s: float = Field(
        default=30.0,
        gt=0,
        description="Window over which the rate of grants is measured, in seconds; `Retry-After` "
        "is computed from that rate. Long enough to hold several answers, short enough to follow "
        "the load.",
    )
    min_retry_after_s: float = Field(
        default=1.0,
        gt=0,
        description="Shortest `Retry-After`, in seconds. It keeps rejected clients from retrying "
        "in a tight loop.",
    )
    max_retry_after_s: float = Field(
        default=60.0,
        gt=0,
        description="Longest `Retry-After`, in seconds; also sent where nothing was granted "
        "recently. The OpenAI SDKs do not wait longer.",
    )

    def of(self, tier: Tier) -> TierQueue:
        """Return the settings of one tier."""
        if tier is Tier.DEFAULT:
            return self.default
        return self.priority if tier is Tier.PRIORITY else self.flex

    @property
    def headroom_everywhere(self) -> bool:
        """Whether replicas that preempt keep headroom too."""
        return self.headroom is not None

    def headroom_share(self, *, preempts: bool) -> float:
        """Return the share of slots kept free on replicas that preempt, or on others."""
        if self.headroom is not None:
            return self.headroom
        return 0.0 if preempts else _HEADROOM

    def headroom_of(self, slots: int) -> int:
        """Return how many of ``slots`` are kept free for priority, where headroom is kept."""
        return headroom_of(self.headroom_share(preempts=False), slots)

    def bounds(self, *, slots: int, ingresses: int) -> dict[Tier, int]:
        """Return the number of waiting requests at which one ingress's queue is full, by tier.

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
        """Return how many requests may wait in one ingress's queue however full it is, by tier."""
        bounds = self.bounds(slots=slots, ingresses=ingresses)
        return {
            tier: _each(self.of(tier).reserved, bounds[tier] * ingresses // 16, ingresses)
            for tier in Tier
        }


_WAITING_PER_SLOT = {Tier.PRIORITY: 32, Tier.DEFAULT: 24, Tier.FLEX: 16}


def _each(wanted: int | None, derived: int, ingresses: int) -> int:
    return math.ceil((derived if wanted is None else wanted) / ingresses)
