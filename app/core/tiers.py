"""Service tiers: the values that a request may send, and their meaning. Pure.

The accepted values and aliases follow OpenAI's ``service_tier`` (``auto``, ``default``, ``flex``,
``priority`` and ``fast``); falling back to ``default`` without an error, at the default price,
follows DeepInfra's Priority tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class Tier(StrEnum):
    """A service tier. Members are declared from the front of the queue to its end."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"

    @property
    def rank(self) -> int:
        """0 for the tier that is served first; tiers with higher ranks wait longer."""
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
    """Return the tier that a request's ``service_tier`` requests.

    Returns ``None`` for ``None`` (the field is absent or null) and for ``"auto"``: both request the
    key's default tier.

    Raises:
        UnknownTierError: ``value`` is anything else that is not an accepted string.
    """
    if value is None:
        return None
    if not isinstance(value, str) or value not in _REQUESTABLE:
        raise UnknownTierError
    return _REQUESTABLE[value]


class TierReason(StrEnum):
    """Why a request is not served at the tier that it requested."""

    MODEL_DOES_NOT_OFFER_TIER = "model_does_not_offer_tier"
    """The model does not offer this tier."""
    KEY_MAY_NOT_USE_TIER = "key_may_not_use_tier"
    """The API key may not use this tier."""
    OVER_PRIORITY_SHARE = "over_priority_share"
    """The key has reached its share of priority traffic."""
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
    """Always: going to the front of the queue counts as delivery, whatever the engine does."""


@dataclass(frozen=True, slots=True)
class TierOffer:
    """Which tiers a model offers, as its operator set it."""

    priority: PriorityMode = PriorityMode.AUTO
    flex: bool = True

    def offers(self, tier: Tier) -> bool:
        """Return whether requests may request this tier, whether or not it is delivered."""
        if tier is Tier.PRIORITY:
            return self.priority is not PriorityMode.OFF
        return self.flex if tier is Tier.FLEX else True
