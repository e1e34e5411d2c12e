"""Service tiers: what a request may ask for, and what it gets. Pure.

The accepted values and aliases follow OpenAI's ``service_tier`` (``auto``, ``default``, ``flex``,
``priority`` and ``fast``); falling back to ``default`` without an error, at the default price,
follows DeepInfra's Priority tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.core.pricing import RateCard


class Tier(StrEnum):
    """A service tier. Members are declared from the front of the line to its end."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"

    @property
    def rank(self) -> int:
        """0 for the tier that is served first; greater numbers wait longer."""
        return _RANKS[self]


_RANKS = {tier: rank for rank, tier in enumerate(Tier)}

AUTO = "auto"
_REQUESTABLE: dict[str, Tier | None] = {
    AUTO: None,
    "default": Tier.DEFAULT,
    "priority": Tier.PRIORITY,
    "fast": Tier.PRIORITY,
    "flex": Tier.FLEX,
}

ACCEPTED_VALUES: tuple[str, ...] = tuple(_REQUESTABLE)
"""The strings that a request's ``service_tier`` may hold, in the order shown to users."""


class UnknownTierError(ValueError):
    """A request's ``service_tier`` is not one of ``ACCEPTED_VALUES``."""

    def __init__(self) -> None:
        accepted = ", ".join(f"'{value}'" for value in ACCEPTED_VALUES)
        super().__init__(f"Invalid value for 'service_tier': expected one of {accepted}.")


def parse_requested(value: object) -> Tier | None:
    """Return the tier that a request's ``service_tier`` asks for.

    ``None`` (the field is absent or null) and ``"auto"`` ask for the key's default tier, for
    which ``None`` is returned.

    Raises:
        UnknownTierError: for anything else that is not an accepted string.
    """
    if value is None:
        return None
    if not isinstance(value, str) or value not in _REQUESTABLE:
        raise UnknownTierError
    return _REQUESTABLE[value]


class TierReason(StrEnum):
    """Why a request is not served at the tier that it asked for."""

    MODEL_DOES_NOT_OFFER_TIER = "model_does_not_offer_tier"
    """The operator has not offered this tier for the model."""
    KEY_MAY_NOT_USE_TIER = "key_may_not_use_tier"
    """The operator has not allowed this tier to the API key."""
    OVER_PRIORITY_SHARE = "over_priority_share"
    """As much of the key's traffic is priority already as may be."""
    ROUTE_DOES_NOT_HONOUR_PRIORITY = "route_does_not_honour_priority"
    """The engine has native priority, but not on the route of this request."""
    NO_REPLICA_HONOURS_PRIORITY = "no_replica_honours_priority"
    """No engine replica with room has native priority in force."""


class PriorityMode(StrEnum):
    """When a model delivers ``priority``."""

    AUTO = "auto"
    """Where the request is placed on an engine replica that has proved native priority."""
    OFF = "off"
    """Never."""
    QUEUE = "queue"
    """Always: going to the front of the line counts as delivery, whatever the engine does."""


@dataclass(frozen=True, slots=True)
class TierOffer:
    """Which tiers a model offers, as its operator set it."""

    priority: PriorityMode = PriorityMode.AUTO
    flex: bool = True


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
