"""A Model's report to the policy, in the only form that Ray Serve carries: numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.config.scaling import ScalingSettings
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class TierReport:
    """One tier, over all ingresses. Counts start when the Model starts.

    Attributes:
        waiting: how many requests wait in the queue.
        running: how many run on engines.
        oldest_s: how long the oldest has waited, in seconds; 0 if none waits.
        arrived: how many requests have arrived.
        finished: how many requests that had a slot have ended.
        served_s: the sum of the times that these held a slot, in seconds.
    """

    waiting: float = 0.0
    running: float = 0.0
    oldest_s: float = 0.0
    arrived: float = 0.0
    finished: float = 0.0
    served_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolReport:
    """A Model's view of one pool.

    Attributes:
        slots: how many requests each replica runs at once.
        ready: how many replicas are ready.
        honours: 1 if priority is delivered there, 0 if not. A pool without a replica so far counts
            as honouring.
        cost: cost of a replica per hour; only compared.
        start_s: how long an engine takes to start once its replica is scheduled, in seconds: the
            longest of the replicas that are ready, or were last; 0 if there was none.
        preempts: 1 if priority takes the slots of running requests there, 0 if not.
    """

    slots: float
    ready: float = 0.0
    honours: float = 1.0
    cost: float = 1.0
    start_s: float = 0.0
    preempts: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """A model's demand, pools and scaling settings.

    The settings are part of the report because Serve restarts an application whose policy
    arguments change.

    Attributes:
        tiers: the demand by tier, for every tier.
        pools: the pools by name.
        headroom: the share of slots that the queue keeps for priority.
        settings: the Model's ``scaling`` settings.
    """

    tiers: Mapping[Tier, TierReport]
    pools: Mapping[str, PoolReport]
    headroom: float = 0.1
    settings: ScalingSettings = field(default_factory=ScalingSettings)

    def to_metrics(self) -> dict[str, float]:
        """Return the report as numbers by name."""
        metrics = {"headroom": float(self.headroom)}
        metrics |= {f"settings/{name}": float(value) for name, value in self.settings}
        for tier, one in self.tiers.items():
            metrics |= {f"tier/{tier}/{name}": float(getattr(one, name)) for name in _TIER}
        for pool, other in self.pools.items():
            metrics |= {f"pool/{pool}/{name}": float(getattr(other, name)) for name in _POOL}
        return metrics

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float]) -> ScalingReport | None:
        """Return the report that ``metrics`` hold; ``None`` if it is incomplete."""
        pools = {name.split("/")[1] for name in metrics if name.startswith("pool/")}
        try:
            return cls(
                {t: TierReport(*(metrics[f"tier/{t}/{name}"] for name in _TIER)) for t in Tier},
                {p: PoolReport(*(metrics[f"pool/{p}/{name}"] for name in _POOL)) for p in pools},
                metrics["headroom"],
                ScalingSettings(**{name: metrics[f"settings/{name}"] for name in _SETTINGS}),
            )
        except KeyError:
            return None


_SETTINGS = tuple(ScalingSettings.model_fields)
_TIER = tuple(TierReport.__dataclass_fields__)
_POOL = tuple(PoolReport.__dataclass_fields__)
