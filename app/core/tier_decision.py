"""The decision about a request's tier: what it asked for, what it gets, and why. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.core.tiers import PriorityMode, Tier, TierOffer, TierReason

if TYPE_CHECKING:
    from app.core.pricing import RateCard


@dataclass(frozen=True, slots=True)
class TierDecision:
    """The one decision about a request's tier; everything that is echoed or billed reads from it.

    ``requested`` is what the client's field asked for (``None``: nothing, or ``auto``),
    ``served`` is the tier that is echoed and billed, ``reason`` says why they differ where they
    do, and ``rate_card`` holds the prices in force when the decision was made.
    """

    requested: Tier | None
    served: Tier
    reason: TierReason | None
    rate_card: RateCard

    def __post_init__(self) -> None:
        lowered = self.requested is not None and self.requested is not self.served
        assert not lowered or self.reason is not None, "a changed tier has a reason"


@dataclass(frozen=True, slots=True)
class TierRights:
    """Which tiers a request's API key may use, at the moment of the request.

    Attributes:
        tiers: the tiers that are allowed to it; ``default`` always is.
        over_share: whether as much of its traffic is priority already as may be.
    """

    tiers: frozenset[Tier] = frozenset(Tier)
    over_share: bool = False


ALL_RIGHTS = TierRights()
"""Of a request without a key, where the ingress is open to all."""


def admit(
    wanted: Tier, offer: TierOffer, rights: TierRights = ALL_RIGHTS
) -> tuple[Tier, TierReason | None]:
    """Return the tier at which a request stands in line, before an engine is chosen.

    ``wanted`` is the requested tier, or the key's default tier where nothing was requested.
    """
    refused = (wanted is Tier.PRIORITY and offer.priority is PriorityMode.OFF) or (
        wanted is Tier.FLEX and not offer.flex
    )
    if refused:
        return Tier.DEFAULT, TierReason.MODEL_DOES_NOT_OFFER_TIER
    if wanted is not Tier.DEFAULT and wanted not in rights.tiers:
        return Tier.DEFAULT, TierReason.KEY_MAY_NOT_USE_TIER
    if wanted is Tier.PRIORITY and rights.over_share:
        return Tier.DEFAULT, TierReason.OVER_PRIORITY_SHARE
    return wanted, None


def decide(
    *,
    requested: Tier | None,
    default_tier: Tier,
    stood_as: Tier,
    offer: TierOffer,
    native_priority: bool,
    route_honoured: bool,
    rate_card: RateCard,
    rights: TierRights = ALL_RIGHTS,
) -> TierDecision:
    """Decide the tier of a request that has been given its place on an engine replica.

    Args:
        requested: what ``parse_requested`` returned.
        default_tier: the tier of a request that asks for none.
        stood_as: the tier at which it stood in line: ``default`` where priority could not be
            delivered when it arrived, and then it is not, whatever came up since.
        offer: the model's tiers.
        native_priority: whether the chosen replica has native priority in force at all.
        route_honoured: whether it honours priority on this request's route.
        rate_card: the prices in force now.
        rights: what the key may use, as when it was admitted.
    """
    served, reason = admit(requested or default_tier, offer, rights)
    delivered = stood_as is Tier.PRIORITY and (
        offer.priority is PriorityMode.QUEUE or route_honoured
    )
    if served is Tier.PRIORITY and not delivered:
        served = Tier.DEFAULT
        reason = (
            TierReason.ROUTE_DOES_NOT_HONOUR_PRIORITY
            if native_priority
            else TierReason.NO_REPLICA_HONOURS_PRIORITY
        )
    return TierDecision(requested, served, reason, rate_card)
