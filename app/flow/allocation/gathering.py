"""Which ingresses gather slots for large requests, and which credits others leave them. Pure.

A large request needs several slots of one replica at once. An ingress whose next request is large
names the replica on which it gathers them. The Model has the others leave it, one gatherer for
each replica, the one that waits at the best tier or has waited longest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from typing import NamedTuple

from app.contracts.credits import Demand
from app.core.tiers import Tier

_TIERS = tuple(Tier)


class Gatherer(NamedTuple):
    """An ingress that gathers slots on a replica; the lowest comes first.

    ``rank`` is that of its tier, or the best one if no tier gets slots before it.
    """

    rank: int
    minus_oldest_s: float
    ingress: str
    slots: int


class Gathering:
    """Who gathers slots, by replica, according to the latest demands of all ingresses."""

    def __init__(self, demands: Collection[Demand], replicas: Container[str]) -> None:
        self._gatherers: dict[str, Gatherer] = {}
        for demand in demands:
            wish = demand.gathers
            if wish is None or wish.replica_id not in replicas:
                continue
            better = _TIERS[: wish.tier.rank]
            others = (one for one in demands if one is not demand)
            if not wish.alone and any(one.waiting[tier] for one in others for tier in better):
                continue
            rank = 0 if wish.alone else wish.tier.rank
            mine = Gatherer(rank, -demand.oldest_s[wish.tier], demand.ingress, wish.slots)
            known = self._gatherers.get(wish.replica_id, mine)
            self._gatherers[wish.replica_id] = min(mine, known)

    def replicas_of(self, ingress: str) -> list[str]:
        """Return the replicas on which an ingress gathers slots."""
        return [name for name, one in self._gatherers.items() if one.ingress == ingress]

    def before_priority(self) -> dict[str, tuple[str, int]]:
        """Return the gatherers that come before all priority, with their slots, by replica."""
        gatherers = self._gatherers.items()
        return {name: (one.ingress, one.slots) for name, one in gatherers if one.rank == 0}

    def left_by(self, ingress: str, headroom: Callable[[str], int]) -> dict[str, tuple[int, int]]:
        """Return how many credits an ingress keeps where another one gathers, and how many free.

        Args:
            ingress: the ingress that leaves the replicas.
            headroom: its headroom on a replica.
        """
        left = {}
        for replica_id, gatherer in self._gatherers.items():
            if gatherer.ingress != ingress:
                kept = headroom(replica_id)
                # It stays free for priority, unless priority comes after the one that gathers.
                left[replica_id] = (kept, 0) if gatherer.rank == 0 else (0, kept)
        return left

    def lacking(self, demand: Demand, held: Mapping[str, int]) -> dict[str, int]:
        """Return how many credits an ingress lacks for its large request, by replica.

        Args:
            demand: the ingress's latest demand.
            held: the credits that it may hold, by replica.
        """
        lacking = {}
        for replica_id in self.replicas_of(demand.ingress):
            running = demand.firm.get(replica_id, (0, 0))[1]
            wanted = running + self._gatherers[replica_id].slots - held.get(replica_id, 0)
            if wanted > 0:
                lacking[replica_id] = wanted
        return lacking
