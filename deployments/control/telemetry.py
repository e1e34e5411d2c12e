"""The metrics of a Model: its engine replicas, and what engines have suspended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from app.contracts.stats import Suspended
from app.contracts.status import ReplicaStatus
from app.core.tiers import Tier
from app.observe import catalogue as c
from app.observe.exporter import Sample
from app.observe.process import process_samples


class ReplicaCounts:
    """Counts the replicas of each pool that became ready, and those that were lost."""

    def __init__(self) -> None:
        self.starts: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self._ready: dict[str, frozenset[str]] = {}

    def look(self, pool: str, ready: frozenset[str], failing: int) -> None:
        """Record one look at a pool.

        Args:
            pool: the pool's name.
            ready: the ids of the replicas that are ready.
            failing: how many replicas Serve runs that are not ready. Serve stops asking a replica
                that is to end, so a replica that has gone is lost only if one is failing.
        """
        before = self._ready.get(pool)
        self._ready[pool] = ready
        if before is None:
            # This Model may have been restarted: they have been there before.
            return
        self.starts[pool] += len(ready - before)
        self.losses[pool] += min(len(before - ready), failing)


def model_samples(
    model: str,
    replicas: Mapping[str, tuple[ReplicaStatus, ...]],
    counts: ReplicaCounts,
    suspended: Mapping[Tier, Suspended],
) -> Iterator[Sample]:
    """Yield the present value of every series of a Model; ``replicas`` are those ready, by pool."""
    for pool, ready in replicas.items():
        yield Sample(c.REPLICAS, (model, pool), len(ready))
        yield Sample(c.REPLICA_SLOTS, (model, pool), sum(one.slots for one in ready))
        yield Sample(c.REPLICA_STARTS, (model, pool), counts.starts[pool])
        yield Sample(c.REPLICA_LOSSES, (model, pool), counts.losses[pool])
    for tier in Tier:
        held = suspended.get(tier, Suspended())
        yield Sample(c.SUSPENDED, (model, tier.value), held.slots)
        yield Sample(c.SUSPENDED_OLDEST, (model, tier.value), held.oldest_s)
    yield from process_samples()
