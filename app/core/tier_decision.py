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


@dataclass(frozen=True, slots=True)
class TierAdmission:
    """The tier at which a request joins the queue, before an engine is chosen.

    Attributes:
        requested: what the client's field asked for; ``None``: nothing, or ``auto``.
        tier: the tier that it may have as far as its model and its key go.
        reason: why that is not the tier that was wanted, where it is not.
    """

    requested: Tier | None
    tier: Tier
    reason: TierReason | None


def admit(
    requested: Tier | None, default_tier: Tier, offer: TierOffer, rights: TierRights = ALL_RIGHTS
) -> TierAdmission:
    """Return the tier at which a request joins the queue.

    Args:
        requested: what ``parse_requested`` returned.
        default_tier: the tier of a request that asks for none.
        offer: the model's tiers.
        rights: what the key may use.
    """
    wanted = requested or default_tier
    reason = None
    if not offer.offers(wanted):
        reason = TierReason.MODEL_DOES_NOT_OFFER_TIER
    elif wanted is not Tier.DEFAULT and wanted not in rights.tiers:
        reason = TierReason.KEY_MAY_NOT_USE_TIER
    elif wanted is Tier.PRIORITY and rights.over_share:
        reason = TierReason.OVER_PRIORITY_SHARE
    return TierAdmission(requested, wanted if reason is None else Tier.DEFAULT, reason)


def decide(
    admitted: TierAdmission,
    *,
    queued_as: Tier,
    offer: TierOffer,
    native_priority: bool,
    route_honoured: bool,
    rate_card: RateCard,
) -> TierDecision:
    """Decide the tier of a request that has been given its slot on an engine replica.

    Args:
        admitted: what ``admit`` returned when it arrived.
        queued_as: the tier at which it was queued: ``default`` where priority could not be
            delivered when it arrived, and then it is not, whatever came up since.
        offer: the model's tiers now; a tier that was withdrawn while it waited is not served.
        native_priority: whether the chosen replica has native priority in force at all.
        route_honoured: whether it honours priority on this request's route.
        rate_card: the prices in force now.
    """
    served, reason = admitted.tier, admitted.reason
    delivered = queued_as is Tier.PRIORITY and (
        offer.priority is PriorityMode.QUEUE or route_honoured
    )
    if not offer.offers(served):
        served, reason = Tier.DEFAULT, TierReason.MODEL_DOES_NOT_OFFER_TIER
    elif served is Tier.PRIORITY and not delivered:
        served = Tier.DEFAULT
        reason = (
            TierReason.ROUTE_DOES_NOT_HONOUR_PRIORITY
            if native_priority
            else TierReason.NO_REPLICA_HONOURS_PRIORITY
        )
    return TierDecision(admitted.requested, served, reason, rate_card)
