"""How far priority may go on replicas that preempt, for all ingresses together. Pure.

Where an engine suspends a running request for one of a better tier, priority need not wait for a
credit that a lower tier uses. An ingress may take slots there up to a limit: the replica's slots,
less those that priority of other ingresses took by their last demands. Between two renewals
ingresses may pass that together, each by no more than the replica's slots. The engine's own order
absorbs it.

If ingresses together want more for priority than there is, each gets a part of every replica, in
proportion to what it wants. Otherwise the one that happens to have the slots would keep them.

The suspended must get on as well. Once a tier has had suspended requests on a replica for its
starvation age, without a break of ``SHORTEST_BREAK_S``, priority leaves one slot in
``starvation_every`` there, at least one, until no request of that tier is left there. So each of
them is resumed after at most that age and the requests that come before it, and then goes on to its
end: priority does not fill the slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from app.config.queue import QueueSettings
from app.contracts.credits import Demand
from app.contracts.stats import Suspended
from app.core.tiers import Tier

SHORTEST_BREAK_S: Final = 1.0
"""Shortest time without suspended requests after which their age starts anew. Where priority
requests end and begin all the time there are gaps of milliseconds between them, in which nothing
that was suspended gets on."""

Taken = tuple[int, ...]
"""Slots taken on a replica, by tier."""

_NONE: Taken = (0,) * len(Tier)
_LOWER = tuple(Tier)[1:]


class PreemptingReplicas:
    """The replicas that preempt, and what ingresses run on them."""

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._slots: dict[str, int] = {}
        self._demands: dict[str, Demand] = {}
        self._totals: dict[str, Taken] = {}
        # Since when a tier has had suspended requests on a replica, since when it has none again,
        # and where that was too long.
        self._since: dict[tuple[str, Tier], float] = {}
        self._break: dict[tuple[str, Tier], float] = {}
        self._owed: set[tuple[str, Tier]] = set()

    def configure(self, settings: QueueSettings) -> None:
        """Apply changed settings."""
        self._settings = settings

    def set_replicas(self, slots: Mapping[str, int]) -> None:
        """Apply which replicas preempt, with the slots of each."""
        self._slots = dict(slots)
        self._totals = {replica_id: self._total(replica_id) for replica_id in slots}
        self._since = {key: at for key, at in self._since.items() if key[0] in slots}
        self._break = {key: at for key, at in self._break.items() if key[0] in slots}
        self._owed = {key for key in self._owed if key[0] in slots}

    def report(self, demand: Demand, now: float) -> None:
        """Record what an ingress runs there and wants."""
        before = self._demands.get(demand.ingress)
        self._demands[demand.ingress] = demand
        self._change(before.taken if before is not None else {}, demand.taken, now)

    def forget(self, ingress: str, now: float) -> None:
        """Forget an ingress that is silent or gone."""
        before = self._demands.pop(ingress, None)
        if before is not None:
            self._change(before.taken, {}, now)

    def _change(self, before: Mapping[str, Taken], taken: Mapping[str, Taken], now: float) -> None:
        changed = [
            replica_id
            for replica_id in before.keys() | taken.keys()
            if replica_id in self._slots and before.get(replica_id) != taken.get(replica_id)
        ]
        for replica_id in changed:
            change = zip(
                self._totals[replica_id],
                taken.get(replica_id, _NONE),
                before.get(replica_id, _NONE),
                strict=True,
            )
            self._totals[replica_id] = tuple(total + new - old for total, new, old in change)
        self._note(changed, now)

    def limits(
        self, ingress: str, now: float, gathered: Mapping[str, tuple[str, int]]
    ) -> dict[str, int]:
        """Return how many slots the priority requests of an ingress may take, by replica.

        Replicas on which they may take all are left out.

        Args:
            ingress: its name.
            now: the time, in seconds.
            gathered: which ingress gathers how many slots for a large request, by replica, where
                priority does not come first.
        """
        demand = self._demands.get(ingress)
        own = demand.taken if demand is not None else {}
        wanted = sum(_priority(demand) for demand in self._demands.values())
        contended = wanted > sum(self._slots.values())
        limits = {}
        for replica_id, slots in self._slots.items():
            others = self._totals[replica_id][0] - own.get(replica_id, _NONE)[0]
            left = self._left_to_suspended(replica_id, now)
            most = slots - others - left
            who, gathers = gathered.get(replica_id, ("", 0))
            if gathers and who != ingress:
                most -= gathers
            elif contended and not gathers:
                most = min(most, self._part(ingress, slots - left, wanted))
            if most < slots:
                limits[replica_id] = max(0, most)
        return limits

    def _part(self, ingress: str, slots: int, wanted: int) -> int:
        """Return an ingress's part of the slots of a replica; all together want ``wanted``.

        What is left by rounding goes to those whose priority requests have waited longest.
        """
        parts = {
            name: slots * _priority(demand) // wanted for name, demand in self._demands.items()
        }
        oldest = sorted(
            self._demands.values(), key=lambda one: (-one.oldest_s[Tier.PRIORITY], one.ingress)
        )
        favoured = [demand.ingress for demand in oldest[: slots - sum(parts.values())]]
        return parts.get(ingress, 0) + (ingress in favoured)

    def suspended(self, now: float) -> dict[Tier, Suspended]:
        """Return which requests engines have suspended, by tier."""
        suspended = {}
        for key in list(self._break):
            self._end_break(key, now)
        for tier in _LOWER:
            slots = sum(
                self._suspended(self._totals[replica_id], slots, tier)
                for replica_id, slots in self._slots.items()
            )
            since = [
                at for key, at in self._since.items() if key[1] is tier and key not in self._break
            ]
            suspended[tier] = Suspended(slots, now - min(since, default=now))
        return suspended

    def _total(self, replica_id: str) -> Taken:
        rows = [demand.taken.get(replica_id, _NONE) for demand in self._demands.values()]
        return tuple(sum(column) for column in zip(*rows, strict=True)) if rows else _NONE

    def _note(self, replica_ids: Iterable[str], now: float) -> None:
        for replica_id in replica_ids:
            for tier in _LOWER:
                key, totals = (replica_id, tier), self._totals[replica_id]
                self._end_break(key, now)
                if self._suspended(totals, self._slots[replica_id], tier):
                    self._since.setdefault(key, now)
                    self._break.pop(key, None)
                elif key in self._since:
                    self._break.setdefault(key, now)
                if not totals[tier.rank]:
                    self._since.pop(key, None)
                    self._break.pop(key, None)
                    self._owed.discard(key)

    def _end_break(self, key: tuple[str, Tier], now: float) -> None:
        """Forget since when there were suspended requests, if there are none for long enough."""
        if now - self._break.get(key, math.inf) >= SHORTEST_BREAK_S:
            del self._since[key], self._break[key]

    @staticmethod
    def _suspended(taken: Taken, slots: int, tier: Tier) -> int:
        """How many slots of a tier's requests exceed what the better tiers leave of the replica."""
        left = max(0, slots - sum(taken[: tier.rank]))
        return max(0, taken[tier.rank] - left)

    def _left_to_suspended(self, replica_id: str, now: float) -> int:
        """Return how many slots of a replica priority leaves to requests that were suspended."""
        settings, owed = self._settings, False
        for tier in _LOWER:
            key = (replica_id, tier)
            self._end_break(key, now)
            if now - self._since.get(key, math.inf) >= settings.of(tier).starvation_age_s:
                self._owed.add(key)
            owed |= key in self._owed
        return math.ceil(self._slots[replica_id] / settings.starvation_every) if owed else 0


def _priority(demand: Demand) -> int:
    """Return how many slots an ingress wants for priority."""
    return demand.running[Tier.PRIORITY] + demand.waiting[Tier.PRIORITY]
