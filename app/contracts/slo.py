"""How many streams of a tier met its objective (``slo`` in a model's settings)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.config.slo import SloSettings
from app.contracts.traffic import Attainment
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class TierAttainment:
    """One tier with an objective, over all ingresses.

    Attributes:
        ttft_ms: the time to the first byte that a stream should meet, in milliseconds.
        objective: the share of streams that should meet it.
        recent: streams that met or missed it lately.
        recent_s: how long that is, in seconds.
        total: streams that met or missed it since the ingresses started.
    """

    ttft_ms: float
    objective: float
    recent: Attainment
    recent_s: float
    total: Attainment

    @property
    def attained(self) -> float | None:
        """The share of recent streams that met it; ``None`` without any."""
        return self.recent.share

    @property
    def kept(self) -> bool | None:
        """Whether recent streams keep the objective; ``None`` without any."""
        return None if (share := self.attained) is None else share >= self.objective


def attainments(
    slo: SloSettings,
    recent: Mapping[Tier, Attainment],
    recent_s: float,
    total: Mapping[Tier, Attainment],
) -> dict[Tier, TierAttainment]:
    """Return the attainment of every tier that has an objective now."""
    none = Attainment()
    return {
        tier: TierAttainment(
            target.ttft_ms, target.p, recent.get(tier, none), recent_s, total.get(tier, none)
        )
        for tier in Tier
        if (target := slo.of(tier)) is not None
    }
