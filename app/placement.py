"""Which engine replica a request goes to.

Keeps count of what this ingress has running in each replica of one model. Pure: holds no
connection, and the time is passed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.dialect import Route
from app.snapshot import ModelSnapshot, ReplicaStatus
from app.tiers import PriorityMode, Tier

SUSPENSION_S = 2.0
"""How long nothing is placed on a replica after its engine could not be reached: longer than it
takes a model to notice that an engine has died, short for one that only hiccuped."""


class Placer:
    """The engine replicas of one model, as one ingress sees them."""

    def __init__(self, snapshot: ModelSnapshot) -> None:
        self.snapshot = snapshot
        self._running: Counter[str] = Counter()
        self._suspended_until: dict[str, float] = {}

    def update(self, snapshot: ModelSnapshot) -> None:
        """Take over what the model reports now."""
        self.snapshot = snapshot
        present = {replica.replica_id for replica in snapshot.replicas}
        self._suspended_until = {
            name: until for name, until in self._suspended_until.items() if name in present
        }

    def report_lost(self, replica: ReplicaStatus, now: float) -> None:
        """Stop placing for a while on a replica whose engine could not be reached."""
        self._suspended_until[replica.replica_id] = now + SUSPENSION_S

    def choose(
        self, route: Route, tier: Tier, now: float, *, without: frozenset[str] = frozenset()
    ) -> ReplicaStatus | None:
        """Return the replica for a request admitted at ``tier``, or ``None`` if there is none.

        A priority request goes to replicas that honour it, if there are any; among those that
        are left the one with the smallest share of its slots taken is chosen. Replicas named in
        ``without`` are left out.
        """
        present = [r for r in self.snapshot.replicas if r.replica_id not in without]
        ready = [r for r in present if self._suspended_until.get(r.replica_id, now) <= now]
        native_wanted = (
            tier is Tier.PRIORITY and self.snapshot.settings.tiers.priority is PriorityMode.AUTO
        )
        honouring = [r for r in ready if r.honours_priority(route)] if native_wanted else []
        return min(honouring or ready, key=self._load, default=None)

    def _load(self, replica: ReplicaStatus) -> tuple[float, str]:
        return self._running[replica.replica_id] / replica.slots, replica.replica_id

    def running(self, replica: ReplicaStatus) -> int:
        """Return how many requests this ingress has in a replica."""
        return self._running[replica.replica_id]

    @contextmanager
    def place(self, replica: ReplicaStatus) -> Iterator[None]:
        """Count a request as running in a replica for as long as the block lasts."""
        self._running[replica.replica_id] += 1
        try:
            yield
        finally:
            self._running[replica.replica_id] -= 1
            if not self._running[replica.replica_id]:
                del self._running[replica.replica_id]
