"""Service tiers: the words that a request may send, and their meaning. Pure.

Falling back to ``default`` without an error, at the default price, follows DeepInfra's Priority
tier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


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


AUTO: Final = "auto"
"""Requests no tier; also stands in metrics for the tier of a request that names none."""


class TierReason(StrEnum):
    """Why a request is not served at the tier that it requested."""

    NO_SUCH_TIER = "no_such_tier"
    """No tier here corresponds to the requested one; other providers have it."""
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


class TierWord(NamedTuple):
    """A word that some provider's API or official SDK uses as a service tier.

    Attributes:
        tier: the tier that it requests; ``None``: the key's default tier.
        used_by: the providers that use it.
        reason: set if no tier here corresponds to the word. It is then served as ``default``.
    """

    tier: Tier | None
    used_by: str
    reason: TierReason | None = None


TIER_WORDS: Final[Mapping[str, TierWord]] = {
    AUTO: TierWord(None, "OpenAI, Anthropic, Azure, Cerebras, Groq"),
    "default": TierWord(Tier.DEFAULT, "OpenAI, Azure, Bedrock, Cerebras, DeepInfra, xAI"),
    "priority": TierWord(
        Tier.PRIORITY,
        "OpenAI, Azure, Bedrock, Cerebras, DeepInfra, Fireworks, Gemini, OpenRouter, Telnyx, xAI",
    ),
    "fast": TierWord(Tier.PRIORITY, "OpenAI"),
    "fast_tier_temp_pilot": TierWord(Tier.PRIORITY, "OpenAI"),
    # Groq's name for its tier that is served first and costs more.
    "performance": TierWord(Tier.PRIORITY, "Groq"),
    "flex": TierWord(
        Tier.FLEX,
        "OpenAI, Azure, Bedrock, Cerebras, DeepInfra, Gemini, Groq, OpenRouter, Telnyx",
    ),
    # Cheaper, and may wait.
    "batch": TierWord(Tier.FLEX, "Anthropic"),
    "standard": TierWord(Tier.DEFAULT, "Anthropic, Gemini, OpenAI"),
    "standard_only": TierWord(Tier.DEFAULT, "Anthropic"),
    "on_demand": TierWord(Tier.DEFAULT, "Groq"),
    "unspecified": TierWord(Tier.DEFAULT, "Gemini"),
    # Capacity that is paid for in advance. Nobody has bought any here, and charging the price of
    # priority for it instead would be a surprise.
    "scale": TierWord(Tier.DEFAULT, "OpenAI, Azure", TierReason.NO_SUCH_TIER),
    "reserved": TierWord(Tier.DEFAULT, "Bedrock", TierReason.NO_SUCH_TIER),
    # Other hardware that generates faster: going first is no substitute.
    "ultrafast": TierWord(Tier.DEFAULT, "OpenAI", TierReason.NO_SUCH_TIER),
}
"""The strings that a request's ``service_tier`` may hold, in the order shown to users."""

NO_WORD: Final = TierWord(None, "")
"""A request whose ``service_tier`` is absent or null."""

ACCEPTED_VALUES: tuple[str, ...] = tuple(TIER_WORDS)


class UnknownTierError(ValueError):
    """A request's ``service_tier`` is not one of ``ACCEPTED_VALUES``."""

    def __init__(self) -> None:
        accepted = ", ".join(f"'{value}'" for value in ACCEPTED_VALUES)
        super().__init__(f"Invalid value for 'service_tier': expected one of {accepted}.")


def parse_requested(value: object) -> TierWord:
    """Return what a request's ``service_tier`` requests; ``None`` is an absent or null field.

    Raises:
        UnknownTierError: ``value`` is anything else that is not an accepted string.
    """
    if value is None:
        return NO_WORD
    word = TIER_WORDS.get(value) if isinstance(value, str) else None
    if word is None:
        raise UnknownTierError
    return word


class PriorityMode(StrEnum):
    """When a model delivers ``priority``."""

    AUTO = "auto"
    """Where the request is placed on an engine replica that has proved native priority."""
    OFF = "off"
    """Never."""
    QUEUE = "queue"
    """Always: going to the front of the queue counts as delivery, whatever the engine does."""

    def delivers(self, *, honoured: bool) -> bool:
        """Return whether priority is delivered.

        Args:
            honoured: whether the engine in question honours priority, on the route in question.
        """
        return self is PriorityMode.QUEUE or (self is PriorityMode.AUTO and honoured)


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
