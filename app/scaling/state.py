"""Input and output of a scaling decision, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class TierDemand:
    """The demand of one tier, over all ingresses.

    Attributes:
        waiting: how many requests wait in the queue.
        running: how many run on engines.
        oldest_s: how long the oldest has waited, in seconds; 0 if none waits.
        rate: forecast of arrivals per second, for when a replica started now is ready.
        service_s: how long a request holds a slot on average, in seconds; ``None`` while unknown.
    """

    waiting: int = 0
    running: int = 0
    oldest_s: float = 0.0
    rate: float = 0.0
    service_s: float | None = None

    @property
    def present(self) -> int:
        """How many requests are waiting or running."""
        return self.waiting + self.running

    @property
    def load(self) -> float:
        """How many slots its requests keep busy in the long run, in Erlangs."""
        return self.present if self.service_s is None else self.rate * self.service_s


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool of engine replicas.

    Attributes:
        name: the pool's name.
        slots: how many requests each replica runs at once.
        replicas: how many replicas it should have, by the last decision.
        least, most: the operator's bounds of ``replicas``.
        honours: whether priority is delivered there.
        cost: cost of a replica per hour, in any currency; only compared.
        preempts: whether priority takes the slots of running requests there.
    """

    name: str
    slots: int
    replicas: int
    least: int
    most: int
    honours: bool = True
    cost: float = 1.0
    preempts: bool = False

    @property
    def slot_cost(self) -> float:
        """Cost of a slot per hour."""
        return self.cost / self.slots


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model at one moment.

    Attributes:
        tiers: its demand by tier, for every tier.
        pools: its pools, at least one.
        headroom: the share of slots that its queue keeps for priority.
        awake: whether it has had requests recently, so that it may not sleep.
        start_s: how long a replica takes from the decision until it serves, in seconds.
        remembered: how many slots priority has needed recently, and so may need again at once.
    """

    tiers: Mapping[Tier, TierDemand]
    pools: tuple[PoolState, ...]
    headroom: float = 0.1
    awake: bool = True
    start_s: float = 0.0
    remembered: int = 0

    @property
    def preempts(self) -> bool:
        """Whether priority takes running requests' slots on every pool that honours it."""
        honouring = [pool for pool in self.pools if pool.honours]
        return bool(honouring) and all(pool.preempts for pool in honouring)


class ScalingReason(StrEnum):
    """Why a pool does not have fewer replicas."""

    LEAST = "least"
    """The operator's lower bound."""
    PRIORITY = "priority"
    """Priority needs them, headroom included."""
    DEFAULT = "default"
    """Default would wait too long with fewer."""
    FLEX = "flex"
    """Flex may keep these replicas."""
    AWAKE = "awake"
    """The model has had requests recently, so it does not sleep yet."""
    PRIORITY_WAITS = "priority_waits"
    """They are no longer needed, but priority waits."""
    NOT_YET = "not_yet"
    """They have not been unneeded for long enough."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many replicas a model needs.

    Attributes:
        replicas: the number of replicas, by pool.
        reasons: why a pool does not have fewer, by pool.
        why: a summary in one line, for operators.
        for_priority: how many slots priority alone needs now.
    """

    replicas: Mapping[str, int]
    reasons: Mapping[str, ScalingReason]
    why: str
    for_priority: int
