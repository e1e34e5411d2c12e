"""The slots of one model that one ingress may use, and which of them to use next. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from app.core.tiers import PriorityMode, Tier
from app.flow.hash_ring import HashRing
from app.flow.replica_slots import LOWEST, RANKS, Kind, ReplicaSlots

_AFFINITY_STEPS = 8
"""Points of the ring to search for a replica with room, before the least loaded one is used."""


@dataclass(frozen=True, slots=True)
class Offer:
    """An engine replica that is ready.

    Attributes:
        replica_id: its name, never used again after a restart.
        pool: the pool that it belongs to.
        slots: how many requests it runs at once.
        routes: the routes on which it honours priority.
        weight: share of the load that its pool takes; of two replicas with weights 2 and 1, the
            first counts as half as busy as it is.
        preempts: whether its engine suspends a running request for one of a better tier.
    """

    replica_id: str
    pool: str
    slots: int
    routes: frozenset[Hashable]
    weight: float = 1.0
    preempts: bool = False


class _Need(NamedTuple):
    """What a request needs of a replica: room for its tier's rank, and not one that failed it."""

    top: int
    slots: int
    without: frozenset[str]


class SlotTable:
    """Every replica of one model, by load and by prefix.

    Attributes:
        headroom: how many free slots are kept for priority, on any replicas that can deliver it.
            A burst goes where room is, and an ingress with one or two credits on each replica
            could not keep a share of each.
        headroom_everywhere: whether replicas that preempt keep headroom too. They need none.
        gathered: a replica on which slots are gathered for a large request: no credits are given
            up there.
        closed: nothing is placed while set.
        slack: how much busier than the least busy replica a prefix's own replica may be, as a
            share of its credits.
    """

    def __init__(self) -> None:
        self.headroom = 0
        self.headroom_everywhere = False
        self.gathered: str | None = None
        self.closed = False
        self.slack = 0.0
        self._mode = PriorityMode.AUTO
        self._by_id: dict[str, ReplicaSlots] = {}
        self._kinds: dict[tuple[str, frozenset[Hashable], float, bool], Kind] = {}
        self._honouring: dict[Hashable, list[Kind]] = {}
        self._all: list[Kind] = []
        self._not_kept: list[Kind] = []
        self._preempting = False
        self._credits: Counter[str] = Counter()
        self._ring = HashRing()
        self._suspended: dict[str, ReplicaSlots] = {}
        # Sums over the replicas where headroom is kept, the first by tier.
        self._kept_room = [0] * RANKS
        self._kept_others = self._kept_credits = 0
        # Sums over all: slots that are idle, and slots that priority could take.
        self._idle = self._room = 0

    def __getitem__(self, replica_id: str) -> ReplicaSlots:
        return self._by_id[replica_id]

    def get(self, replica_id: str) -> ReplicaSlots | None:
        """Return a replica; ``None`` if it is unknown."""
        return self._by_id.get(replica_id)

    def __iter__(self) -> Iterator[ReplicaSlots]:
        return iter(self._by_id.values())

    @property
    def free(self) -> int:
        """How many slots are idle, headroom included."""
        return 0 if self.closed else self._idle

    @property
    def has_room(self) -> bool:
        """Whether a request of some tier may be placed."""
        return (self._room > 0 or self._idle > 0) and not self.closed

    @property
    def headroom_is_low(self) -> bool:
        """Whether less than half of the headroom is free."""
        return 2 * self._kept_room[LOWEST] < self.headroom

    def credits_in(self, pool: str) -> int:
        """Return how many credits are held in a pool."""
        return self._credits[pool]

    def held(self) -> dict[str, tuple[int, int]]:
        """Return credits and slots taken, by replica, where there are any."""
        return {p.replica_id: (p.credit, p.running) for p in self if p.credit or p.running}

    def taken(self) -> dict[str, tuple[int, ...]]:
        """Return the slots taken by tier, on the replicas that preempt, where there are any."""
        return {p.replica_id: tuple(p.taken) for p in self if p.running and p.kind.preempts}

    def delivers(self, route: Hashable) -> bool:
        """Whether priority can be delivered on a route, as far as is known.

        Suspended replicas do not count; busy ones do. True while no replica is ready.
        """
        return bool(self._kinds_for_priority(route)) or not any(kind.ready for kind in self._all)

    def find(
        self,
        tier: Tier,
        route: Hashable,
        prefix: int | None = None,
        without: frozenset[str] = frozenset(),
        held_back: str | None = None,
        out_of_turn: bool = False,
        slots: int = 1,
    ) -> ReplicaSlots | None:
        """Return the replica for a request now; ``None`` if there is no room for it.

        A priority request goes to replicas that honour priority on its route. If none of these
        is ready except those in ``without``, it is placed like any other request. Other requests
        leave the headroom free. A starving request, served ``out_of_turn``, may use headroom, as
        long as requests below priority run on no more than the slots that are not headroom.
        Nothing is placed on a replica that is ``held_back``.

        Idle slots are taken first. Then, where the engine preempts, those of the lowest tier: flex
        before default. Among the replicas with such room, the prefix's own replica is chosen if it
        is at most ``slack`` busier than the least loaded one; otherwise the least loaded one.
        """
        if self.closed:
            return None
        kinds = self._kinds_for_priority(route, without) if tier is Tier.PRIORITY else []
        top = 0
        if not kinds:
            top = max(tier.rank, Tier.DEFAULT.rank)
            kinds = self._kinds_for_others(top, out_of_turn, slots, held_back)
        need = _Need(top, slots, without if held_back is None else without | {held_back})
        found = self._choose(kinds, LOWEST, need, prefix)
        if found is not None or not self._preempting:
            return found
        # An engine preempts for a request only on routes where it knows the request's tier.
        able = [kind for kind in kinds if kind.preempts and route in kind.routes]
        for rank in range(LOWEST - 1, top - 1, -1):
            if (found := self._choose(able, rank, need, prefix)) is not None:
                return found
        return None

    def _choose(
        self, kinds: list[Kind], rank: int, need: _Need, prefix: int | None
    ) -> ReplicaSlots | None:
        """Return the replica of some kinds for a request, among those with room for a tier."""
        least: ReplicaSlots | None = None
        for kind in kinds:
            replica = kind.by_load[rank].least(*need)
            if replica is not None and (least is None or replica.load[rank] < least.load[rank]):
                least = replica
        if least is None or prefix is None or len(self._by_id) == 1:
            return least
        top, slots, without = need
        for replica_id in self._ring.after(prefix, _AFFINITY_STEPS):
            replica = self._by_id[replica_id]
            if (
                replica.has_room(rank, top, slots)
                and replica.load[rank] <= least.load[rank] + self.slack
                and replica.kind in kinds
                and replica_id not in without
            ):
                return replica
        return least

    def able(
        self, tier: Tier, route: Hashable, without: frozenset[str], slots: int
    ) -> list[ReplicaSlots]:
        """Return the ready replicas on which a request of so many slots could be placed if idle."""
        kinds = self._kinds_for_priority(route, without) if tier is Tier.PRIORITY else []
        return [
            replica
            for replica in self
            if replica.ready
            and replica.slots >= slots
            and replica.replica_id not in without
            and (not kinds or replica.kind in kinds)
        ]

    def most_slots(self, headroom_of: Callable[[int], int]) -> dict[Tier, int]:
        """Return how many slots of one replica a request can take at most, by tier.

        Args:
            headroom_of: how many of so many slots are kept for priority in a pool.
        """
        kept: dict[str, list[int]] = {}
        elsewhere = 1
        for replica in self:
            if replica.present and replica.kind.kept:
                kept.setdefault(replica.kind.pool, []).append(replica.slots)
            elif replica.present:
                elsewhere = max(elsewhere, replica.slots)
        not_headroom = sum(sum(slots) - headroom_of(sum(slots)) for slots in kept.values())
        lower = min(not_headroom, max(map(max, kept.values()), default=0))
        # On the only replica of a pool, other ingresses keep their part of the headroom.
        first = [
            slots[0] - max(0, headroom_of(slots[0]) - self.headroom)
            if len(slots) == 1
            else max(slots)
            for slots in kept.values()
        ]
        most = dict.fromkeys(Tier, max(elsewhere, lower))
        return most | {Tier.PRIORITY: max(elsewhere, *first, lower)}

    def headroom_lacking_beside(self, replica: ReplicaSlots, tier: Tier) -> int:
        """Return how much of the headroom has to be free on a replica, because others lack it."""
        if tier is Tier.PRIORITY or not replica.kind.kept:
            return 0
        beside = self._kept_room[tier.rank] - replica.room[tier.rank]
        return max(0, self.headroom - beside)

    def occupy(self, replica: ReplicaSlots, tier: Tier, slots: int) -> None:
        """Change the slots that requests of a tier take on a replica; less if negative."""
        replica.taken[tier.rank] += slots
        replica.running += slots
        assert replica.taken[tier.rank] >= 0, "slots are counted right"
        if replica.kind.kept and tier is not Tier.PRIORITY:
            self._kept_others += slots
        self._list(replica)
        self._forget(replica)

    def add(self, replica: ReplicaSlots, credits: int) -> None:
        """Change the credits on a replica; fewer if negative."""
        replica.credit += credits
        assert replica.credit >= 0, "credits are counted right"
        self._credits[replica.kind.pool] += credits
        if replica.kind.kept:
            self._kept_credits += credits
        self._list(replica)
        self._forget(replica)

    def add_credits(self, replica_id: str, added: int) -> None:
        """Add credits on a replica, which may be unknown so far."""
        replica = self._by_id.get(replica_id)
        if replica is None:
            kind = self._kind(Offer("", "", 0, frozenset()))
            replica = self._by_id[replica_id] = ReplicaSlots(replica_id, kind)
        self.add(replica, added)

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Set how many slots priority may take on replicas that preempt; all where not named."""
        for replica in self:
            limit = limits.get(replica.replica_id, replica.slots)
            if replica.kind.preempts and limit != replica.limit:
                replica.limit = limit
                self._list(replica)

    def forget_credits(self) -> None:
        """Drop every credit; running requests go on."""
        for replica in list(self):
            replica.limit = None
            self.add(replica, -replica.credit)

    def give_up(self, pool: str, most: int, keep: int = 0, tier: Tier = Tier.FLEX) -> int:
        """Drop up to ``most`` credits of a pool whose slots are free, and return how many.

        At least ``keep`` slots stay free where headroom is kept. On replicas that preempt, slots
        taken by requests below ``tier`` count as free.
        """
        left = most
        spare = [
            replica
            for replica in self
            if replica.kind.pool == pool
            and replica.spare(tier)
            and replica.replica_id != self.gathered
        ]
        # The busiest first, so that the remaining free slots are well spread.
        for replica in sorted(spare, key=lambda replica: (-replica.use, replica.replica_id)):
            while left and self.give_up_at(replica, keep, tier):
                left -= 1
        return most - left

    def give_up_at(self, replica: ReplicaSlots, keep: int, tier: Tier = Tier.FLEX) -> bool:
        """Drop a credit on a replica if ``give_up`` may; return whether it was dropped."""
        if not replica.spare(tier):
            return False
        if replica.kind.kept and self._kept_room[LOWEST] <= keep:
            return False
        self.add(replica, -1)
        return True

    def suspend(self, replica_id: str, until: float) -> None:
        """Place nothing on a replica before ``until``."""
        replica = self._by_id.get(replica_id)
        if replica is not None and replica.present:
            self._alter(replica, replica.kind, present=True, suspended_until=until)
            self._suspended[replica_id] = replica

    def resume(self, now: float) -> bool:
        """End the suspensions that are over, and return whether there were any."""
        if not self._suspended:
            return False
        over = [replica for replica in self._suspended.values() if replica.suspended_until <= now]
        for replica in over:
            del self._suspended[replica.replica_id]
            self._alter(replica, replica.kind, present=replica.present)
        return bool(over)

    def next_resume(self) -> float:
        """Return when the next suspension ends; infinity if there is none."""
        if not self._suspended:
            return math.inf
        return min((p.suspended_until for p in self._suspended.values()), default=math.inf)

    def set_replicas(self, offers: Iterable[Offer], mode: PriorityMode) -> None:
        """Apply which replicas there are, and when priority is delivered.

        Credits on replicas that are gone are dropped.
        """
        offered = {offer.replica_id: offer for offer in offers}
        for replica in [replica for replica in self if replica.replica_id not in offered]:
            self._suspended.pop(replica.replica_id, None)
            self._alter(replica, replica.kind, present=False)
            self.add(replica, -replica.credit)
        for replica_id, offer in offered.items():
            kind = self._kind(offer)
            replica = self._by_id.setdefault(replica_id, ReplicaSlots(replica_id, kind))
            replica.slots = offer.slots
            if not replica.present or replica.kind is not kind:
                self._alter(replica, kind, present=True, suspended_until=replica.suspended_until)
        self._mode = mode
        self._recount()

    def keep_headroom(self, *, everywhere: bool) -> None:
        """Set whether replicas that preempt keep headroom too."""
        if everywhere is not self.headroom_everywhere:
            self.headroom_everywhere = everywhere
            self._recount()

    def _forget(self, replica: ReplicaSlots) -> None:
        if not (replica.present or replica.credit or replica.running):
            del self._by_id[replica.replica_id]

    def _kind(self, offer: Offer) -> Kind:
        key = (offer.pool, offer.routes, offer.weight, offer.preempts)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = Kind(*key)
            self._recount()
        return kind

    def _kinds_for_priority(
        self, route: Hashable, without: frozenset[str] = frozenset()
    ) -> list[Kind]:
        kinds = self._honouring.get(route)
        if kinds is None:
            mode = self._mode
            kinds = [k for k in self._all if k.ready and mode.delivers(honoured=route in k.routes)]
            self._honouring[route] = kinds
        if not without:
            return kinds
        excluded = Counter(
            replica.kind for replica in map(self._by_id.get, without) if replica and replica.ready
        )
        return [kind for kind in kinds if kind.ready > excluded[kind]]

    def _kinds_for_others(
        self, rank: int, out_of_turn: bool, slots: int, held_back: str | None
    ) -> list[Kind]:
        room = self._kept_room[rank]
        if held_back is not None and (replica := self._by_id[held_back]).kind.kept:
            # What is gathered there will be taken, and headroom has to be free besides.
            room -= replica.room[rank]
        if room >= self.headroom + slots:
            return self._all
        if out_of_turn and self._kept_others + slots <= self._kept_credits - self.headroom:
            return self._all
        return self._not_kept

    def _list(self, replica: ReplicaSlots) -> None:
        """Update a replica's room, its load, and its entry on the ring."""
        if replica.on_ring is not (replica.credit > 0):
            replica.on_ring = replica.credit > 0
            (self._ring.add if replica.on_ring else self._ring.remove)(replica.replica_id)
        room, load = replica.measure()
        old, kind = replica.room, replica.kind
        self._idle += room[LOWEST] - old[LOWEST]
        self._room += room[0] - old[0]
        if kind.kept:
            kept = self._kept_room
            kept[0] += room[0] - old[0]
            kept[1] += room[1] - old[1]
            kept[2] += room[2] - old[2]
        kind.list(replica, room, load)

    def _alter(
        self,
        replica: ReplicaSlots,
        kind: Kind,
        *,
        present: bool,
        suspended_until: float = -math.inf,
    ) -> None:
        """Change a replica's kind, or whether it is ready."""
        old, was_ready = replica.kind, replica.ready
        replica.present = False
        self._list(replica)
        replica.present, replica.suspended_until = present, suspended_until
        if kind is not old:
            replica.kind = kind
            self._credits[old.pool] -= replica.credit
            self._credits[kind.pool] += replica.credit
            self._kept_others += replica.others * (kind.kept - old.kept)
            self._kept_credits += replica.credit * (kind.kept - old.kept)
        old.ready -= int(was_ready)
        kind.ready += int(replica.ready)
        self._honouring.clear()
        self._list(replica)

    def _recount(self) -> None:
        """Recompute where headroom is kept, and the sums."""
        self._all = list(self._kinds.values())
        for kind in self._all:
            kind.honours = self._mode.delivers(honoured=bool(kind.routes))
            kind.kept = kind.honours and (self.headroom_everywhere or not kind.preempts)
        self._not_kept = [kind for kind in self._all if not kind.kept]
        self._preempting = any(kind.preempts for kind in self._all)
        self._honouring.clear()
        kept = [replica for replica in self if replica.kind.kept]
        self._kept_room = [sum(replica.room[rank] for replica in kept) for rank in range(RANKS)]
        self._kept_others = sum(replica.others for replica in kept)
        self._kept_credits = sum(replica.credit for replica in kept)
