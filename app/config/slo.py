"""Settings of a model's service level objectives."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings
from app.core.tiers import Tier


class TierSlo(Settings):
    """The objective of one tier: a share of its streams begins within a time."""

    ttft_ms: float = Field(
        gt=0,
        description="Time to the first byte that a stream should meet, in milliseconds, time in "
        "the queue included.",
    )
    p: float = Field(
        default=0.99,
        gt=0,
        lt=1,
        description="Share of streams that should meet it. The rest is the error budget that "
        "alerts watch. 0.99 by default: one in a hundred may be late, as in most SLAs for p99.",
    )


class SloSettings(Settings):
    """Service level objectives of one model. They are measured; no request depends on them."""

    priority: TierSlo | None = Field(
        default=None, description="Objective of priority streams. Not set: none is measured."
    )
    default: TierSlo | None = Field(
        default=None, description="Objective of default streams. Not set: none is measured."
    )
    flex: TierSlo | None = Field(
        default=None, description="Objective of flex streams. Not set: none is measured."
    )

    def of(self, tier: Tier) -> TierSlo | None:
        """Return the objective of a tier; ``None`` if it has none."""
        slo: TierSlo | None = getattr(self, tier.value)
        return slo
