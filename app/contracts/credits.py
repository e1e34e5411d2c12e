"""What an ingress and a Model say to each other about credits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.contracts.status import ModelSnapshot
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Demand:
    """What an ingress holds and wants.

    Attributes:
        ingress: its name, never used again after a restart.
        number: counts the demands of this ingress.
        sent_at: when it was sent, by the ingress's own clock; only handed back.
        life: the Model whose grant was applied last; empty if none was.
        applied: the number of that grant.
        held: credits and running requests, by replica; replicas with neither are left out.
        running: how many of its requests run, by tier.
        waiting: how many wait, by tier.
        oldest_s: how long the oldest of them has waited, by tier; 0 where none waits.
        starving: how many wait in tiers that starve.
        suspects: replicas that have taken requests and sent nothing to any for too long, each with
            the route of one of those. No credits depend on it.
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


@dataclass(frozen=True, slots=True)
class Grant:
    """What the Model gives an ingress.

    Attributes:
        life: this Model's life; a restarted Model has another.
        number: counts the grants to this ingress in this life.
        answers: the number of the demand that it answers.
        sent_at: that demand's ``sent_at``.
        anew: forget every credit held so far: they have been given away.
        added: new credits, by replica.
        at_most: how many credits to keep, by pool; a pool that is not named has no limit.
        headroom: how many of its free slots to keep for priority; ``None``: as before.
        keep: how many of its free slots it keeps when it gives up credits: its headroom, or less
            where others lack slots for priority.
        ingresses: how many ingresses share the model now.
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


@dataclass(frozen=True, slots=True)
class Renewal:
    """A Model's answer to an ingress that renews its credits.

    Attributes:
        version: of what there is to know about the model.
        snapshot: the model as it is now; ``None`` if the ingress knows that version.
        grant: the credits that the ingress gets.
    """

    version: str
    snapshot: ModelSnapshot | None
    grant: Grant
