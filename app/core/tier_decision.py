"""The decision about a request's tier: requested, served, and why they differ. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.core.tiers import PriorityMode, Tier, TierOffer, TierReason

if TYPE_CHECKING:
    from app.core.pricing import RateCard


@dataclass(frozen=True, slots=True)
class TierDecision:
    """The one decision about a request's tier; everything echoed or billed reads from it.

    Attributes:
        requested: the tier that the client requested; ``None``: none, or ``auto``.
        served: the tier that is echoed and billed.
        reason: why ``served`` is not the tier that was wanted; ``None`` if it is.
        rate_card: the prices in force when the decision was made.
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
    """Which tiers a request's API key may use, when the request arrives.

    Attributes:
        tiers: the tiers that the key may use; ``default`` is always allowed.
        over_share: whether the key has reached its share of priority traffic.
    """

    tiers: frozenset[Tier] = frozenset(Tier)
    over_share: bool = False


ALL_RIGHTS = TierRights()
"""The rights of a request without a key, under ``auth: open``."""


@dataclass(frozen=True, slots=True)
class TierAdmission:
    """The tier at which a request joins the queue, before an engine is chosen.

    Attributes:
        requested: the tier that the client requested; ``None``: none, or ``auto``.
        tier: the tier that its model and its key allow.
        reason: why ``tier`` is not the tier that was wanted; ``None`` if it is.
    """

    requested: Tier | None
    tier: Tier
    reason: TierReason | None


def admit(
    requested: Tier | None, default_tier: Tier, offer: TierOffer, rights: TierRights = ALL_RIGHTS
) -> TierAdmission:
    """Return the tier at which a request joins the queue.

    Args:
        requested: the result of ``parse_requested``.
        default_tier: the tier of a request that requests none.
        offer: the model's tiers.
        rights: the key's rights.
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
    """Decide the tier of a request that has received its slot on an engine replica.

    Args:
        admitted: the result of ``admit`` when it arrived.
        queued_as: the tier at which it was queued. ``default`` if priority could not be delivered
            when it arrived; then it is served as default, whatever has changed since.
        offer: the model's tiers now. A tier withdrawn while the request waited is not served.
        native_priority: whether the chosen replica has native priority in force on any route.
        route_honoured: whether the replica honours priority on this request's route.
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
