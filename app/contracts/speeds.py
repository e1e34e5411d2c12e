"""How fast a model has served its requests lately, by tier, over all ingresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Self

from app.contracts.traffic import TierTraffic, Traffic
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """The requests of one served tier that ended within the window.

    Attributes:
        requests: how many there were.
        ttft_p50_s, ttft_p99_s: time to the first token of streams, in seconds; ``None`` if there
            were none.
        tokens_per_s: the median speed of one stream; ``None`` if there were none.
    """

    requests: int = 0
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tokens_per_s: float | None = None

    @classmethod
    def of(cls, traffic: TierTraffic) -> Self:
        """Return the speed of these requests."""
        per_token_s = traffic.per_token.quantile(0.5)
        return cls(
            requests=traffic.duration.count,
            ttft_p50_s=traffic.ttft.quantile(0.5),
            ttft_p99_s=traffic.ttft.quantile(0.99),
            tokens_per_s=1 / per_token_s if per_token_s else None,
        )


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds of a model.

    Attributes:
        over_s: how long the window is, in seconds; 0 if nothing is known.
        tiers: by tier; all of them.
    """

    over_s: float = 0.0
    tiers: Mapping[Tier, TierSpeed] = field(
        default_factory=lambda: dict.fromkeys(Tier, TierSpeed())
    )

    @classmethod
    def of(cls, recent: Traffic, over_s: float) -> Self:
        """Return the speeds of the requests that ended within the last ``over_s`` seconds."""
        nothing = TierTraffic()
        return cls(over_s, {t: TierSpeed.of(recent.tiers.get(t, nothing)) for t in Tier})

    def to_fields(self) -> dict[str, Any]:
        """Return JSON values; ``from_fields`` reads them."""
        return {
            "over_s": self.over_s,
            "tiers": {tier.value: astuple(speed) for tier, speed in self.tiers.items()},
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Return what ``to_fields`` was called on."""
        return cls(
            fields["over_s"],
            {tier: TierSpeed(*fields["tiers"][tier.value]) for tier in Tier},
        )
