"""Messages between an ingress and a Model about credits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.contracts.status import ModelSnapshot
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Gathers:
    """A large request that is next, and gathers slots.

    Attributes:
        replica_id: the replica on which it gathers them.
        slots: how many have to be free there.
        tier: its tier.
        alone: whether it starves and its turn has come: better tiers get no slots there either.
    """

    replica_id: str
    slots: int
    tier: Tier
    alone: bool


@dataclass(frozen=True, slots=True)
class Demand:
    """What an ingress holds and wants.

    Attributes:
        ingress: the ingress's name, never reused after a restart.
        number: counts the demands of this ingress.
        sent_at: when it was sent, in seconds by the ingress's own clock; the grant returns it.
        life: the life of the Model whose grant was applied last; empty if none was.
        applied: the number of that grant.
        held: credits and slots taken, by replica; replicas with neither are left out.
        running: how many slots its running requests take, by tier.
        waiting: how many slots its waiting requests would take, by tier.
        oldest_s: how long the oldest of them has waited, in seconds, by tier; 0 if none waits.
        starving: how many requests wait in tiers that are starving.
        suspects: replicas that have accepted requests and sent nothing to any for too long, each
            with the route of one of these requests. Credits do not depend on it.
        taken: slots taken by tier, on the replicas that preempt.
        gathers: set if its next request takes several slots, which it gathers.
    """

    ingress: str
    number: int
    sent_at: float
    life: str
    applied: int
    held: Mapping[str, tuple[int, int]]
    running: Mapping[Tier, int]
    waiting: Mapping[Tier, int]
    oldest_s: Mapping[Tier, float]
    starving: int
    suspects: Mapping[str, str] = field(default_factory=dict)
    taken: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gathers: Gathers | None = None

    @property
    def firm(self) -> dict[str, tuple[int, int]]:
        """Credits, and slots taken that no other tier takes back, by replica.

        Where the engine preempts, flex yields its slots to default.
        """
        return {
            replica_id: (credit, sum(self.taken[replica_id][:-1]))
            if replica_id in self.taken
            else (credit, running)
            for replica_id, (credit, running) in self.held.items()
        }


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits that the Model grants to an ingress.

    Attributes:
        life: identifies this Model process; a restarted Model has another.
        number: grows with every grant of this life.
        answers: the number of the demand that it answers.
        sent_at: the ``sent_at`` of that demand.
        anew: drop every credit held so far, because they were granted to others.
        added: new credits, by replica.
        at_most: how many credits to keep, by pool; a pool that is not named has no limit.
        headroom: how many free slots to keep for priority; ``None``: as before.
        keep: how many free slots to keep when giving up credits: the headroom, or less if others
            lack slots for priority.
        ingresses: how many ingresses share the model now.
        limits: how many slots its priority requests may take on a replica that preempts; all of
            them where it is not named.
        for_tier: on replicas that preempt, slots taken by requests below this tier count as free
            when credits are given up, by pool.
        leave: replicas on which another ingress gathers slots. Credits are given up there as soon
            as their slots are free, but for so many, and so many free ones.
    """

    life: str
    number: int
    answers: int
    sent_at: float
    anew: bool = False
    added: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    headroom: int | None = None
    keep: int = 0
    ingresses: int = 1
    limits: Mapping[str, int] = field(default_factory=dict)
    for_tier: Mapping[str, Tier] = field(default_factory=dict)
    leave: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Renewal:
    """A Model's answer to an ingress that renews its credits.

    Attributes:
        version: the version of the model's snapshot.
        snapshot: the model as it is now; ``None`` if the ingress has that version.
        grant: the credits granted to the ingress.
    """

    version: str
    snapshot: ModelSnapshot | None
    grant: Grant
