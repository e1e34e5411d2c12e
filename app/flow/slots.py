"""The slots of one model that one ingress may use, and which of them to use next. Pure."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from app.core.tiers import PriorityMode, Tier
from app.flow.hash_ring import HashRing

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
    """

    replica_id: str
    pool: str
    slots: int
    routes: frozenset[Hashable]
    weight: float = 1.0


class ReplicaSlots:
    """One replica as one ingress sees it. Only ``SlotTable`` changes it.

    Attributes:
        replica_id: its name.
        slots: how many requests it runs at once, for all ingresses together.
        credit: how many of these slots this ingress may use.
        running: how many requests of this ingress run there; more than ``credit`` only after
            credits were dropped while requests ran on them.
        others: how many of the running requests are not priority.
        present: whether the model reports it as ready.
        suspended_until: nothing is placed on it before; minus infinity if it is not suspended.
        free: how many more requests may be placed on it now.
        load: share of the credits in use, divided by the weight; infinity if none is free.
    """

    __slots__ = (
        "credit",
        "free",
        "kind",
        "load",
        "on_ring",
        "others",
        "present",
        "replica_id",
        "running",
        "slots",
        "suspended_until",
    )

    def __init__(self, replica_id: str, kind: _Kind) -> None:
        self.replica_id = replica_id
        self.kind = kind
        self.slots = self.credit = self.running = self.others = self.free = 0
        self.load = 0.0
        self.present = self.on_ring = False
        self.suspended_until = -math.inf

    @property
    def ready(self) -> bool:
        """Whether requests may be placed there if there is room."""
        return self.present and self.suspended_until == -math.inf


class _Kind:
    """The replicas of one pool that honour priority on the same routes."""

    def __init__(self, pool: str, routes: frozenset[Hashable], weight: float) -> None:
        self.pool = pool
        self.routes = routes
        self.weight = weight
        self.ready = 0
        self.kept = False
        # A heap by load. An entry is valid while its replica has that load and a free slot. A
        # replica that left and came back is a new object; ``id`` keeps the two from being compared.
        self._by_load: list[tuple[float, str, int, ReplicaSlots]] = []
        self._limit = 64

    def add(self, replica: ReplicaSlots) -> None:
        """List a replica with a free slot under its load."""
        heapq.heappush(self._by_load, (replica.load, replica.replica_id, id(replica), replica))
        if len(self._by_load) > self._limit:
            valid = {entry[1]: entry for entry in self._by_load if self._holds(entry)}
            self._by_load = sorted(valid.values())
            self._limit = 64 + 4 * len(valid)

    def least_loaded(self, without: frozenset[str]) -> ReplicaSlots | None:
        """Return the least loaded replica with a free slot; ``None`` if there is none."""
        by_load, aside = self._by_load, []
        found = None
        while by_load:
            entry = by_load[0]
            if not self._holds(entry):
                heapq.heappop(by_load)
            elif entry[1] in without:
                aside.append(heapq.heappop(by_load))
            else:
                found = entry[3]
                break
        for entry in aside:
            heapq.heappush(by_load, entry)
        return found

    def _holds(self, entry: tuple[float, str, int, ReplicaSlots]) -> bool:
        load, _, _, replica = entry
        return replica.free > 0 and replica.load == load and replica.kind is self


class SlotTable:
    """Every replica of one model, by load and by prefix.

    Attributes:
        headroom: how many free slots are kept for priority, on any replicas that can deliver it.
            A burst goes where room is, and an ingress with one or two credits on each replica
            could not keep a share of each.
        closed: nothing is placed while set.
        slack: how much busier than the least busy replica a prefix's own replica may be, as a
            share of its credits.
    """

    def __init__(self) -> None:
        self.headroom = 0
        self.closed = False
        self.slack = 0.0
        self._mode = PriorityMode.AUTO
        self._by_id: dict[str, ReplicaSlots] = {}
        self._kinds: dict[tuple[str, frozenset[Hashable], float], _Kind] = {}
        self._honouring: dict[Hashable, list[_Kind]] = {}
        self._all: list[_Kind] = []
        self._not_kept: list[_Kind] = []
        self._credits: Counter[str] = Counter()
        self._ring = HashRing()
        self._suspended: dict[str, ReplicaSlots] = {}
        # Sums over the replicas where headroom is kept; the last one over the others.
        self._free = self._others = self._kept_credits = 0
        self._free_elsewhere = 0

    def __getitem__(self, replica_id: str) -> ReplicaSlots:
        return self._by_id[replica_id]

    def __iter__(self) -> Iterator[ReplicaSlots]:
        return iter(self._by_id.values())

    @property
    def free(self) -> int:
        """How many slots are free, headroom included."""
        return 0 if self.closed else self._free + self._free_elsewhere

    @property
    def headroom_is_low(self) -> bool:
        """Whether less than half of the headroom is free."""
        return 2 * self._free < self.headroom

    def credits_in(self, pool: str) -> int:
        """Return how many credits are held in a pool."""
        return self._credits[pool]

    def held(self) -> dict[str, tuple[int, int]]:
        """Return credits and running requests, by replica, where there are any."""
        return {p.replica_id: (p.credit, p.running) for p in self if p.credit or p.running}

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
        out_of_turn: bool = False,
    ) -> ReplicaSlots | None:
        """Return the replica for a request now; ``None`` if there is no room for it.

        A priority request goes to replicas that honour priority on its route. If none of these
        is ready except those in ``without``, it is placed like any other request. Other requests
        leave the headroom free. A starving request, served ``out_of_turn``, may use headroom, as
        long as requests below priority run on no more than the slots that are not headroom.

        Among the replicas with room, the prefix's own replica is chosen if it is at most ``slack``
        busier than the least loaded one; otherwise the least loaded one.
        """
        if self.closed:
            return None
        kinds = self._kinds_for_priority(route, without) if tier is Tier.PRIORITY else None
        if not kinds:
            kinds = self._kinds_for_others(out_of_turn)
        least: ReplicaSlots | None = None
        for kind in kinds:
            replica = kind.least_loaded(without)
            if replica is not None and (least is None or replica.load < least.load):
                least = replica
        if least is None or prefix is None:
            return least
        for replica_id in self._ring.after(prefix, _AFFINITY_STEPS):
            replica = self._by_id[replica_id]
            if (
                replica.free
                and replica.load <= least.load + self.slack
                and replica.kind in kinds
                and replica_id not in without
            ):
                return replica
        return least

    def change(
        self, replica: ReplicaSlots, *, credit: int = 0, running: int = 0, others: int = 0
    ) -> None:
        """Change the credits and the running requests of a replica."""
        replica.credit += credit
        replica.running += running
        replica.others += others
        assert replica.credit >= 0 and replica.running >= replica.others >= 0, (
            "slots are counted right"
        )
        if credit:
            self._credits[replica.kind.pool] += credit
        if replica.kind.kept:
            self._others += others
            self._kept_credits += credit
        self._list(replica)
        if not (replica.present or replica.credit or replica.running):
            del self._by_id[replica.replica_id]

    def add_credits(self, replica_id: str, added: int) -> None:
        """Add credits on a replica, which may be unknown so far."""
        replica = self._by_id.get(replica_id)
        if replica is None:
            replica = self._by_id[replica_id] = ReplicaSlots(
                replica_id, self._kind("", frozenset())
            )
        self.change(replica, credit=added)

    def forget_credits(self) -> None:
        """Drop every credit; running requests go on."""
        for replica in list(self):
            self.change(replica, credit=-replica.credit)

    def give_up(self, pool: str, most: int, keep: int = 0) -> int:
        """Drop up to ``most`` credits of a pool whose slots are free, and return how many.

        At least ``keep`` slots stay free where headroom is kept.
        """
        left = most
        free = [replica for replica in self if replica.free and replica.kind.pool == pool]
        # The busiest first, so that the remaining free slots are well spread.
        for replica in sorted(free, key=lambda replica: (-replica.load, replica.replica_id)):
            while left and self.give_up_at(replica, keep):
                left -= 1
        return most - left

    def give_up_at(self, replica: ReplicaSlots, keep: int) -> bool:
        """Drop a credit on a replica if ``give_up`` may; return whether it was dropped."""
        if not replica.free or (replica.kind.kept and self._free <= keep):
            return False
        self.change(replica, credit=-1)
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
            self.change(replica, credit=-replica.credit)
        for replica_id, offer in offered.items():
            kind = self._kind(offer.pool, offer.routes, offer.weight)
            replica = self._by_id.setdefault(replica_id, ReplicaSlots(replica_id, kind))
            replica.slots = offer.slots
            if not replica.present or replica.kind is not kind:
                self._alter(replica, kind, present=True, suspended_until=replica.suspended_until)
        self._mode = mode
        self._recount()

    def _kind(self, pool: str, routes: frozenset[Hashable], weight: float = 1.0) -> _Kind:
        kind = self._kinds.get((pool, routes, weight))
        if kind is None:
            kind = self._kinds[pool, routes, weight] = _Kind(pool, routes, weight)
            self._recount()
        return kind

    def _kinds_for_priority(
        self, route: Hashable, without: frozenset[str] = frozenset()
    ) -> list[_Kind]:
        kinds = self._honouring.get(route)
        if kinds is None:
            queue = self._mode is PriorityMode.QUEUE
            kinds = [k for k in self._all if k.kept and k.ready and (queue or route in k.routes)]
            self._honouring[route] = kinds
        if not without:
            return kinds
        excluded = Counter(
            replica.kind for replica in map(self._by_id.get, without) if replica and replica.ready
        )
        return [kind for kind in kinds if kind.ready > excluded[kind]]

    def _kinds_for_others(self, out_of_turn: bool) -> list[_Kind]:
        if self._free > self.headroom:
            return self._all
        if out_of_turn and self._others < self._kept_credits - self.headroom:
            return self._all
        return self._not_kept

    def _list(self, replica: ReplicaSlots) -> None:
        """Update a replica's free slots, its load, and its entry on the ring."""
        if replica.on_ring is not (replica.credit > 0):
            replica.on_ring = replica.credit > 0
            (self._ring.add if replica.on_ring else self._ring.remove)(replica.replica_id)
        free = replica.credit - replica.running if replica.ready else 0
        free = max(free, 0)
        load = replica.running / replica.credit / replica.kind.weight if free else math.inf
        if replica.kind.kept:
            self._free += free - replica.free
        else:
            self._free_elsewhere += free - replica.free
        relisted = free and (not replica.free or load != replica.load)
        replica.free, replica.load = free, load
        if relisted:
            replica.kind.add(replica)

    def _alter(
        self,
        replica: ReplicaSlots,
        kind: _Kind,
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
            self._others += replica.others * (kind.kept - old.kept)
            self._kept_credits += replica.credit * (kind.kept - old.kept)
        old.ready -= int(was_ready)
        kind.ready += int(replica.ready)
        self._honouring.clear()
        self._list(replica)

    def _recount(self) -> None:
        """Recompute where headroom is kept, and the sums."""
        self._all = list(self._kinds.values())
        for kind in self._all:
            auto = self._mode is PriorityMode.AUTO and bool(kind.routes)
            kind.kept = auto or self._mode is PriorityMode.QUEUE
        self._not_kept = [kind for kind in self._all if not kind.kept]
        self._honouring.clear()
        self._free = self._free_elsewhere = self._others = self._kept_credits = 0
        for replica in self:
            if replica.kind.kept:
                self._free += replica.free
                self._others += replica.others
                self._kept_credits += replica.credit
            else:
                self._free_elsewhere += replica.free
