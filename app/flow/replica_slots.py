"""One engine replica as one ingress sees it, and replicas of one kind by their load. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable

from app.core.tiers import Tier

RANKS = len(Tier)
LOWEST = RANKS - 1
_NO_ROOM = (0,) * RANKS
_NO_LOAD = (math.inf,) * RANKS


class ReplicaSlots:
    """One replica as one ingress sees it. Only ``SlotTable`` changes it.

    A replica that preempts has room for a request if fewer than its slots are taken by requests of
    the same tier or better: the engine suspends those below. Elsewhere every request counts.

    Attributes:
        replica_id: its name.
        slots: how many sequences it runs at once, for all ingresses together.
        credit: how many of these slots this ingress may use.
        limit: how many of them its priority requests may take in all, where the replica preempts;
            ``None``: as many as ``credit``.
        taken: how many slots requests of this ingress take, by tier.
        running: their sum; more than ``credit`` where the engine preempts, or after credits were
            dropped while requests ran on them.
        present: whether the model reports it as ready.
        suspended_until: nothing is placed on it before; minus infinity if it is not suspended.
        room: how many more slots may be taken now, by tier.
        load: share of the credits in use by requests of a tier or better, divided by the weight, by
            tier; infinity if there is no room.
    """

    __slots__ = (
        "credit",
        "kind",
        "limit",
        "load",
        "on_ring",
        "present",
        "replica_id",
        "room",
        "running",
        "slots",
        "suspended_until",
        "taken",
    )

    def __init__(self, replica_id: str, kind: Kind) -> None:
        self.replica_id = replica_id
        self.kind = kind
        self.slots = self.credit = self.running = 0
        self.limit: int | None = None
        self.taken = [0] * RANKS
        self.room: tuple[int, ...] = _NO_ROOM
        self.load: tuple[float, ...] = _NO_LOAD
        self.present = self.on_ring = False
        self.suspended_until = -math.inf

    @property
    def ready(self) -> bool:
        """Whether requests may be placed there if there is room."""
        return self.present and self.suspended_until == -math.inf

    @property
    def free(self) -> int:
        """How many slots are idle: a request of any tier may take one."""
        return self.room[LOWEST]

    @property
    def others(self) -> int:
        """How many slots are taken by requests below priority."""
        return self.running - self.taken[0]

    def has_room(self, rank: int, top: int, slots: int) -> bool:
        """Whether a request of tier ``top`` may take slots that ``rank`` could take too."""
        return self.room[rank] >= slots and self.room[top] >= slots

    @property
    def use(self) -> float:
        """Share of the credits in use, divided by the weight; more than that where it preempts."""
        return self.running / max(self.credit, 1) / self.kind.weight

    def spare(self, tier: Tier) -> int:
        """Return how many credits are not in use by requests of a tier or better.

        Where nothing is preempted, every request counts. 0 while the replica is not ready.
        """
        if not self.ready:
            return 0
        taken = sum(self.taken[: tier.rank + 1]) if self.kind.preempts else self.running
        return max(0, self.credit - taken)

    def measure(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Work out ``room`` and ``load`` anew."""
        if not self.present or self.suspended_until != -math.inf:
            return _NO_ROOM, _NO_LOAD
        credit, weight = self.credit, self.kind.weight
        if not self.kind.preempts:
            free = credit - self.running
            if free <= 0:
                return _NO_ROOM, _NO_LOAD
            load = self.running / credit / weight
            return (free, free, free), (load, load, load)
        first, second, _ = self.taken
        limit = credit if self.limit is None else self.limit
        measured = ((first, limit), (first + second, credit), (self.running, credit))
        room = tuple(max(0, most - taken) for taken, most in measured)
        load_by_tier = tuple(
            taken / most / weight if most > taken else math.inf for taken, most in measured
        )
        return room, load_by_tier


class ByLoad:
    """The replicas of one kind with room for a tier, the least loaded first.

    A heap by load. An entry is valid while its replica has that load and room. A replica that left
    and came back is a new object; ``id`` keeps the two from being compared.
    """

    def __init__(self, kind: Kind, rank: int) -> None:
        self._kind = kind
        self._rank = rank
        self._entries: list[tuple[float, str, int, ReplicaSlots]] = []
        self._limit = 64

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, replica: ReplicaSlots) -> None:
        """List a replica with room under its load."""
        entry = (replica.load[self._rank], replica.replica_id, id(replica), replica)
        heapq.heappush(self._entries, entry)
        if len(self._entries) > self._limit:
            valid = {entry[1]: entry for entry in self._entries if self._holds(entry)}
            self._entries = sorted(valid.values())
            self._limit = 64 + 4 * len(valid)

    def least(self, top: int, slots: int, without: frozenset[str]) -> ReplicaSlots | None:
        """Return the least loaded replica with so much room, which tier ``top`` has there too."""
        entries, aside = self._entries, []
        found = None
        while entries:
            entry = entries[0]
            if not self._holds(entry):
                heapq.heappop(entries)
            elif entry[1] in without or not entry[3].has_room(self._rank, top, slots):
                aside.append(heapq.heappop(entries))
            else:
                found = entry[3]
                break
        for entry in aside:
            heapq.heappush(entries, entry)
        return found

    def _holds(self, entry: tuple[float, str, int, ReplicaSlots]) -> bool:
        load, _, _, replica = entry
        return (
            replica.room[self._rank] > 0
            and replica.load[self._rank] == load
            and replica.kind is self._kind
        )


class Kind:
    """The replicas of one pool that honour priority on the same routes."""

    def __init__(
        self, pool: str, routes: frozenset[Hashable], weight: float, preempts: bool
    ) -> None:
        self.pool = pool
        self.routes = routes
        self.weight = weight
        self.preempts = preempts
        self.ready = 0
        # Whether priority is delivered there, and whether headroom is kept there.
        self.honours = self.kept = False
        # Where nothing is preempted, all tiers have the same room.
        ranks = range(RANKS) if preempts else (LOWEST,)
        self.by_load = {rank: ByLoad(self, rank) for rank in ranks}

    def list(self, replica: ReplicaSlots, room: tuple[int, ...], load: tuple[float, ...]) -> None:
        """Set the room and the load of a replica, and list it under them."""
        old_room, old_load = replica.room, replica.load
        replica.room, replica.load = room, load
        for rank, by_load in self.by_load.items():
            if room[rank] and (not old_room[rank] or load[rank] != old_load[rank]):
                by_load.add(replica)
