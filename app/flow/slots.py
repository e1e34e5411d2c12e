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
"""How far along the ring to look for a replica with room, before taking the least loaded."""


@dataclass(frozen=True, slots=True)
class Offer:
    """An engine replica that is ready.

    Attributes:
        replica_id: its name, never used again after a restart.
        pool: the pool that it belongs to.
        slots: how many requests it runs at once.
        routes: the routes on which it honours priority.
        weight: how much of the load its pool takes; of two replicas with weights 2 and 1 the
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
        slots: how many requests it runs at once, of all ingresses together.
        credit: how many of them this ingress may use.
        running: how many of its requests run there; more than ``credit`` only after credits
            were taken back under running requests.
        others: how many of those are not priority.
        present: whether the model reports it as ready.
        suspended_until: nothing is placed on it before; minus infinity if it is not suspended.
        free: how many more requests may be placed on it now.
        load: which share of the credits is in use, divided by the weight.
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
        """Whether requests may be placed there, room permitting."""
        return self.present and self.suspended_until == -math.inf


class _Kind:
    """The replicas of one pool that honour priority on the same routes."""

    def __init__(self, pool: str, routes: frozenset[Hashable], weight: float) -> None:
        self.pool = pool
        self.routes = routes
        self.weight = weight
        self.ready = 0
        self.kept = False
        # By load. An entry holds as long as its place has that load and a free slot. A replica
        # that went and came back is another place; the number keeps the two from being compared.
        self._by_load: list[tuple[float, str, int, ReplicaSlots]] = []
        self._limit = 64

    def add(self, place: ReplicaSlots) -> None:
        """List a place with a free slot under its load."""
        heapq.heappush(self._by_load, (place.load, place.replica_id, id(place), place))
        if len(self._by_load) > self._limit:
            valid = {entry[1]: entry for entry in self._by_load if self._holds(entry)}
            self._by_load = sorted(valid.values())
            self._limit = 64 + 4 * len(valid)

    def least_loaded(self, without: frozenset[str]) -> ReplicaSlots | None:
        """Return the place with the least load among those with a free slot."""
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
        load, _, _, place = entry
        return place.free > 0 and place.load == load and place.kind is self


class SlotTable:
    """Every replica of one model, by load and by prefix.

    Attributes:
        headroom: how many free slots are kept for priority, on whichever replicas can deliver
            it: a burst goes where room is, and an ingress that holds one or two credits on each
            replica could not keep a share of each.
        closed: nothing is placed at all while set.
        slack: how much busier than the least busy replica, as a share of its credits, the one
            that a prefix belongs to may be.
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
        # Over the replicas where headroom is kept, and over the others.
        self._free = self._others = self._kept_credits = 0
        self._free_elsewhere = 0

    def __getitem__(self, replica_id: str) -> ReplicaSlots:
        return self._by_id[replica_id]

    def __iter__(self) -> Iterator[ReplicaSlots]:
        return iter(self._by_id.values())

    @property
    def free(self) -> int:
        """How many slots are free, headroom and all."""
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
        """Whether priority can be delivered on a route, as far as anybody can tell.

        Replicas that are suspended do not count, busy ones do. Before one is ready it may.
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
        """Return where a request may be placed now; ``None`` if there is no room for it.

        Priority goes to replicas that honour it on its route, if any but those ``without`` is
        ready; where none is, it is placed like any other request. Others leave the headroom
        free; one that is served ``out_of_turn``, because it starves, may go below it as long as
        no more than the slots that are not headroom run requests like it.

        Among the replicas with room the one that the prefix belongs to is taken if it is no more
        than ``slack`` busier than the least loaded, else the least loaded.
        """
        if self.closed:
            return None
        kinds = self._kinds_for_priority(route, without) if tier is Tier.PRIORITY else None
        if not kinds:
            kinds = self._kinds_for_others(out_of_turn)
        least: ReplicaSlots | None = None
        for kind in kinds:
            place = kind.least_loaded(without)
            if place is not None and (least is None or place.load < least.load):
                least = place
        if least is None or prefix is None:
            return least
        for replica_id in self._ring.after(prefix, _AFFINITY_STEPS):
            place = self._by_id[replica_id]
            if (
                place.free
                and place.load <= least.load + self.slack
                and place.kind in kinds
                and replica_id not in without
            ):
                return place
        return least

    def change(
        self, place: ReplicaSlots, *, credit: int = 0, running: int = 0, others: int = 0
    ) -> None:
        """Change what is held and used on a replica."""
        place.credit += credit
        place.running += running
        place.others += others
        assert place.credit >= 0 and place.running >= place.others >= 0, "slots are counted right"
        if credit:
            self._credits[place.kind.pool] += credit
        if place.kind.kept:
            self._others += others
            self._kept_credits += credit
        self._list(place)
        if not (place.present or place.credit or place.running):
            del self._by_id[place.replica_id]

    def add_credits(self, replica_id: str, added: int) -> None:
        """Add credits on a replica, which need not be known yet."""
        place = self._by_id.get(replica_id)
        if place is None:
            place = self._by_id[replica_id] = ReplicaSlots(replica_id, self._kind("", frozenset()))
        self.change(place, credit=added)

    def forget_credits(self) -> None:
        """Drop every credit; what runs goes on."""
        for place in list(self):
            self.change(place, credit=-place.credit)

    def give_up(self, pool: str, most: int, keep: int = 0) -> int:
        """Drop at most so many credits of a pool whose slots are free, and return how many.

        At least ``keep`` slots stay free where headroom is kept.
        """
        left = most
        free = [place for place in self if place.free and place.kind.pool == pool]
        # From the busiest on, so that what is left free is well spread.
        for place in sorted(free, key=lambda place: (-place.load, place.replica_id)):
            while left and self.give_up_at(place, keep):
                left -= 1
        return most - left

    def give_up_at(self, place: ReplicaSlots, keep: int) -> bool:
        """Drop a credit on a replica if ``give_up`` could, and return whether it was dropped."""
        if not place.free or (place.kind.kept and self._free <= keep):
            return False
        self.change(place, credit=-1)
        return True

    def suspend(self, replica_id: str, until: float) -> None:
        """Place nothing on a replica before a time."""
        place = self._by_id.get(replica_id)
        if place is not None and place.present:
            self._alter(place, place.kind, present=True, suspended_until=until)
            self._suspended[replica_id] = place

    def resume(self, now: float) -> bool:
        """End the suspensions whose time is over, and return whether there were any."""
        if not self._suspended:
            return False
        over = [place for place in self._suspended.values() if place.suspended_until <= now]
        for place in over:
            del self._suspended[place.replica_id]
            self._alter(place, place.kind, present=place.present)
        return bool(over)

    def next_resume(self) -> float:
        """Return when the next suspension ends; infinity if there is none."""
        if not self._suspended:
            return math.inf
        return min((p.suspended_until for p in self._suspended.values()), default=math.inf)

    def set_replicas(self, offers: Iterable[Offer], mode: PriorityMode) -> None:
        """Take over which replicas there are, and when priority is delivered at all.

        Credits on replicas that are gone are dropped.
        """
        offered = {offer.replica_id: offer for offer in offers}
        for place in [place for place in self if place.replica_id not in offered]:
            self._suspended.pop(place.replica_id, None)
            self._alter(place, place.kind, present=False)
            self.change(place, credit=-place.credit)
        for replica_id, offer in offered.items():
            kind = self._kind(offer.pool, offer.routes, offer.weight)
            place = self._by_id.setdefault(replica_id, ReplicaSlots(replica_id, kind))
            place.slots = offer.slots
            if not place.present or place.kind is not kind:
                self._alter(place, kind, present=True, suspended_until=place.suspended_until)
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
            place.kind for place in map(self._by_id.get, without) if place and place.ready
        )
        return [kind for kind in kinds if kind.ready > excluded[kind]]

    def _kinds_for_others(self, out_of_turn: bool) -> list[_Kind]:
        if self._free > self.headroom:
            return self._all
        if out_of_turn and self._others < self._kept_credits - self.headroom:
            return self._all
        return self._not_kept

    def _list(self, place: ReplicaSlots) -> None:
        """Put a place in its right place among those with room, and on the ring."""
        if place.on_ring is not (place.credit > 0):
            place.on_ring = place.credit > 0
            (self._ring.add if place.on_ring else self._ring.remove)(place.replica_id)
        free = place.credit - place.running if place.ready else 0
        free = max(free, 0)
        load = place.running / place.credit / place.kind.weight if free else math.inf
        if place.kind.kept:
            self._free += free - place.free
        else:
            self._free_elsewhere += free - place.free
        relisted = free and (not place.free or load != place.load)
        place.free, place.load = free, load
        if relisted:
            place.kind.add(place)

    def _alter(
        self, place: ReplicaSlots, kind: _Kind, *, present: bool, suspended_until: float = -math.inf
    ) -> None:
        """Change what a replica is, or whether it is ready."""
        old, was_ready = place.kind, place.ready
        place.present = False
        self._list(place)
        place.present, place.suspended_until = present, suspended_until
        if kind is not old:
            place.kind = kind
            self._credits[old.pool] -= place.credit
            self._credits[kind.pool] += place.credit
            self._others += place.others * (kind.kept - old.kept)
            self._kept_credits += place.credit * (kind.kept - old.kept)
        old.ready -= int(was_ready)
        kind.ready += int(place.ready)
        self._honouring.clear()
        self._list(place)

    def _recount(self) -> None:
        """Sum up again where headroom is kept."""
        self._all = list(self._kinds.values())
        for kind in self._all:
            auto = self._mode is PriorityMode.AUTO and bool(kind.routes)
            kind.kept = auto or self._mode is PriorityMode.QUEUE
        self._not_kept = [kind for kind in self._all if not kind.kept]
        self._honouring.clear()
        self._free = self._free_elsewhere = self._others = self._kept_credits = 0
        for place in self:
            if place.kind.kept:
                self._free += place.free
                self._others += place.others
                self._kept_credits += place.credit
            else:
                self._free_elsewhere += place.free
