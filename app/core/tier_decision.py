"""The decision about a request's tier: requested, served, and why they differ. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from app.core.tiers import Tier, TierOffer, TierReason

if TYPE_CHECKING:
    from app.core.pricing import RateCard

ANSWER_CUT_OFF: Final = "answer_cut_off"
"""The reason of a downgrade whose answer was cut off or failed: its record has the reason of that
instead of the tier's."""
RAISED: Final = "start_within_passed"
"""The reason of a request that had not started in time, and was raised to a better tier."""
_RAISED_AND: Final = f"{RAISED}, "
_TIER_REASONS: Final = frozenset(reason.value for reason in TierReason)
DOWNGRADE_REASONS: Final = (*(reason.value for reason in TierReason), ANSWER_CUT_OFF)
"""Every reason that ``downgrade_reason`` returns."""


@dataclass(frozen=True, slots=True)
class TierDecision:
    """The one decision about a request's tier; everything echoed or billed reads from it.

    Attributes:
        requested: the tier that the client requested; ``None``: none, or ``auto``.
        served: the tier that is echoed and billed.
        reason: why ``served`` is not the tier that was wanted; ``None`` if it is.
        rate_card: the prices in force when the decision was made.
        raised: whether the request had not started in time, and was raised to a better tier. The
            wanted tier is then the one that it was to be raised to.
    """

    requested: Tier | None
    served: Tier
    reason: TierReason | None
    rate_card: RateCard
    raised: bool = False

    def __post_init__(self) -> None:
        changed = self.requested is not None and self.requested is not self.served
        assert not changed or self.why is not None, "a changed tier has a reason"

    @property
    def why(self) -> str | None:
        """Why the served tier is not the requested one, for headers and records; else ``None``."""
        reason = None if self.reason is None else self.reason.value
        if not self.raised:
            return reason
        return RAISED if reason is None else _RAISED_AND + reason


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
    requested: Tier | None,
    default_tier: Tier,
    offer: TierOffer,
    rights: TierRights = ALL_RIGHTS,
    reason: TierReason | None = None,
) -> TierAdmission:
    """Return the tier at which a request joins the queue.

    Args:
        requested: the tier that the request names (``parse_requested``).
        default_tier: the tier of a request that requests none.
        offer: the model's tiers.
        rights: the key's rights.
        reason: why ``requested`` already stands for another tier, which there is not here.
    """
    wanted = requested or default_tier
    if reason is not None:
        return TierAdmission(requested, Tier.DEFAULT, reason)
    if not offer.offers(wanted):
        reason = TierReason.MODEL_DOES_NOT_OFFER_TIER
    elif wanted is not Tier.DEFAULT and wanted not in rights.tiers:
        reason = TierReason.KEY_MAY_NOT_USE_TIER
    elif wanted is Tier.PRIORITY and rights.over_share:
        reason = TierReason.OVER_PRIORITY_SHARE
    return TierAdmission(requested, wanted if reason is None else Tier.DEFAULT, reason)


def admit_raised(
    admitted: TierAdmission, tier: Tier, offer: TierOffer, rights: TierRights = ALL_RIGHTS
) -> TierAdmission | None:
    """Return the tier to which a request is raised if it does not start in time.

    Args:
        admitted: the result of ``admit`` for the request.
        tier: the tier that it is to be raised to: ``default`` or ``priority``.
        offer: the model's tiers.
        rights: the key's rights, when the request arrives.

    Returns:
        ``default`` with a reason if ``tier`` is not for this request. ``None`` if the tier is no
        better than that at which the request was admitted.
    """
    found = admit(tier, Tier.DEFAULT, offer, rights)
    if found.tier.rank >= admitted.tier.rank:
        return None
    return TierAdmission(admitted.requested, found.tier, found.reason)


def is_raised(reason: str | None) -> bool:
    """Return whether a record's reason says that the request was raised."""
    return reason is not None and (reason == RAISED or reason.startswith(_RAISED_AND))


def and_raised(reason: str) -> str:
    """Return the reason of an answer that was cut off, for a request that was raised."""
    return _RAISED_AND + reason


def without_raise(reason: str | None) -> str | None:
    """Return a record's reason without saying that the request was raised."""
    if reason is None or not is_raised(reason):
        return reason
    return reason[len(_RAISED_AND) :] or None


def downgrade_reason(requested: Tier | None, served: Tier | None, reason: str | None) -> str | None:
    """Return why a request was not served as requested; ``None`` if it was, or was not served.

    This is the one definition of a downgrade, for metrics, the board and the usage page. It covers
    each request whose answer named a reason in ``x-service-tier-reason``: also one that requested a
    tier by a word that there is not here (``scale``), by its key's default, or flex where there is
    none. A request that was refused because it insists on its tier is no downgrade. Neither is one
    that was raised, unless it was to be raised to priority and could not have it.

    Args:
        requested: the tier that the request names; ``None`` for none, or ``auto``.
        served: the tier that it was served at; ``None`` if it reached no engine.
        reason: the reason in its record: why the tier differs, or why there is no whole answer.
    """
    if served is None:
        return None
    if is_raised(reason):
        why = without_raise(reason)
        return why if why in _TIER_REASONS else None
    if reason in _TIER_REASONS:
        return reason
    return None if requested in (None, served) else ANSWER_CUT_OFF


def keeps_to_tier(
    requested: Tier | None, reason: TierReason | None, *, strict: bool, required: bool
) -> bool:
    """Return whether a request may be served, although ``reason`` lowers its tier.

    Args:
        requested: the tier that the request names.
        reason: why it would be served at another tier than wanted; ``None`` if it would not.
        strict: the model refuses requests that name a tier which they would not get.
        required: the request itself wants its tier, or no answer.
    """
    return reason is None or not (required or (strict and requested is not None))


def decide(
    admitted: TierAdmission,
    *,
    queued_as: Tier,
    offer: TierOffer,
    native_priority: bool,
    route_honoured: bool,
    rate_card: RateCard,
    raised: bool = False,
) -> TierDecision:
    """Decide the tier of a request that has received its slot on an engine replica.

    Args:
        admitted: the result of ``admit`` when it arrived; that of ``admit_raised`` if it was
            raised.
        queued_as: the tier at which it was queued. ``default`` if priority could not be delivered
            when it arrived; then it is served as default, whatever has changed since.
        offer: the model's tiers now. A tier withdrawn while the request waited is not served.
        native_priority: whether the chosen replica has native priority in force on any route.
        route_honoured: whether the replica honours priority on this request's route.
        rate_card: the prices in force now.
        raised: whether it had not started in time, and was raised.
    """
    served, reason = admitted.tier, admitted.reason
    delivered = queued_as is Tier.PRIORITY and offer.priority.delivers(honoured=route_honoured)
    if not offer.offers(served):
        served, reason = Tier.DEFAULT, TierReason.MODEL_DOES_NOT_OFFER_TIER
    elif served is Tier.PRIORITY and not delivered:
        served = Tier.DEFAULT
        reason = (
            TierReason.ROUTE_DOES_NOT_HONOUR_PRIORITY
            if native_priority
            else TierReason.NO_REPLICA_HONOURS_PRIORITY
        )
    return TierDecision(admitted.requested, served, reason, rate_card, raised)
