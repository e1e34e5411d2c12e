"""What the number of replicas is decided from, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class TierDemand:
    """The demand of one tier, at all ingresses together.

    Attributes:
        waiting: how many requests wait in the queue.
        running: how many run on engines.
        oldest_s: how long the oldest has waited; 0 where none waits.
        rate: how many will arrive a second, by the time that a replica started now is ready.
        service_s: how long one keeps a slot, on the average; ``None`` while nobody knows.
    """

    waiting: int = 0
    running: int = 0
    oldest_s: float = 0.0
    rate: float = 0.0
    service_s: float | None = None

    @property
    def present(self) -> int:
        """How many requests there are, waiting or running."""
        return self.waiting + self.running

    @property
    def load(self) -> float:
        """How many slots they keep busy in the long run, in Erlangs."""
        return self.present if self.service_s is None else self.rate * self.service_s


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool of engine replicas.

    Attributes:
        name: the pool's.
        slots: how many requests each replica runs at once.
        replicas: how many it is to have, by the last decision.
        least, most: the operator's bounds.
        honours: whether priority is delivered there.
        cost: what a replica costs an hour, in whatever currency; only compared.
    """

    name: str
    slots: int
    replicas: int
    least: int
    most: int
    honours: bool = True
    cost: float = 1.0

    @property
    def slot_cost(self) -> float:
        """What a slot costs an hour."""
        return self.cost / self.slots


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model at one moment.

    Attributes:
        tiers: its demand, by tier; every tier is there.
        pools: its pools, at least one.
        headroom: the share of slots that its queue keeps for priority.
        awake: whether somebody has asked lately, so that it may not sleep.
        start_s: how long a replica takes from the decision until it serves.
        remembered: how many slots priority has needed lately, and so may need again at once.
    """

    tiers: Mapping[Tier, TierDemand]
    pools: tuple[PoolState, ...]
    headroom: float = 0.1
    awake: bool = True
    start_s: float = 0.0
    remembered: int = 0


class ScalingReason(StrEnum):
    """Why a pool has so many replicas and not fewer."""

    LEAST = "least"
    """The operator wants no fewer."""
    PRIORITY = "priority"
    """Priority needs them, headroom included."""
    DEFAULT = "default"
    """Default would wait for too long."""
    FLEX = "flex"
    """Flex may keep them."""
    AWAKE = "awake"
    """Somebody has asked lately, so the model does not sleep yet."""
    PRIORITY_WAITS = "priority_waits"
    """They have become needless, but priority waits."""
    NOT_YET = "not_yet"
    """They have become needless only lately."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many replicas a model ought to have.

    Attributes:
        replicas: by pool.
        reasons: why a pool has as many and not fewer, by pool.
        why: the same, in one line for people.
        for_priority: how many slots priority needs now, by itself.
    """

    replicas: Mapping[str, int]
    reasons: Mapping[str, ScalingReason]
    why: str
    for_priority: int
