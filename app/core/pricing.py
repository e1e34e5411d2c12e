"""Prices and costs of requests. Pure; money is ``Decimal`` throughout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, model_validator

from app.core.settings import Settings
from app.core.tiers import Tier

# Prices are per 10^6 tokens.
_TOKENS_EXPONENT: Final = Decimal(-6)

EXACT: Final = Context(prec=100, traps=[Inexact, InvalidOperation, Overflow])
"""Arithmetic on money: raises ``decimal.Inexact`` rather than round.

A product of a count of tokens, a price and a multiplier has at most 60 digits; the rest is room
for sums. Python's default of 28 digits would silently round the costs of long prices.
"""

_NOTHING: Final = Decimal(0)
_MAX_PRICE: Final = 1_000_000
_MAX_DECIMALS: Final = 12


def _short(value: Decimal) -> Decimal:
    if value.is_finite() and -int(value.normalize().as_tuple().exponent) <= _MAX_DECIMALS:
        return value
    raise ValueError(f"at most {_MAX_DECIMALS} decimal places are allowed")


Price = Annotated[Decimal, Field(ge=0, le=_MAX_PRICE), AfterValidator(_short)]
"""USD per million tokens. The bound on decimals keeps every product exact in ``Decimal``."""


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens that one request used. ``cached_tokens`` are part of ``prompt_tokens``."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.cached_tokens <= self.prompt_tokens or self.completion_tokens < 0:
            raise ValueError(f"impossible token counts: {self}")


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of one request: a rate card's, in USD per million tokens, and the served tier's
    factor on all of them.
    """

    input: Decimal
    cached_input: Decimal
    output: Decimal
    multiplier: Decimal

    def cost(self, usage: TokenUsage) -> Decimal:
        """Return what ``usage`` costs, in USD, exactly."""
        if not usage.prompt_tokens and not usage.completion_tokens:
            return _NOTHING
        times, fresh = EXACT.multiply, usage.prompt_tokens - usage.cached_tokens
        at_default = EXACT.add(
            EXACT.add(
                times(Decimal(fresh), self.input),
                times(Decimal(usage.cached_tokens), self.cached_input),
            ),
            times(Decimal(usage.completion_tokens), self.output),
        )
        return EXACT.scaleb(times(at_default, self.multiplier), _TOKENS_EXPONENT)


class Multipliers(Settings):
    """The price of each tier relative to ``default``, which is always 1."""

    priority: Price = Decimal("1.5")
    flex: Price = Decimal("0.8")

    def of(self, tier: Tier) -> Decimal:
        """Return the factor on every price for requests served at ``tier``."""
        match tier:
            case Tier.PRIORITY:
                return self.priority
            case Tier.FLEX:
                return self.flex
            case Tier.DEFAULT:
                return Decimal(1)


class RateCard(Settings):
    """The prices of one model, in USD per million tokens."""

    input: Price = Field(default=Decimal(0), description="Prompt tokens.")
    cached_input: Price = Field(
        default=Decimal(0),
        description="Prompt tokens found in the engine's prefix cache. Not set: the price of "
        "`input`.",
    )
    output: Price = Field(default=Decimal(0), description="Generated tokens.")
    multipliers: Multipliers = Field(
        default=Multipliers(), description="Factor on all prices, by tier; see below."
    )

    @model_validator(mode="before")
    @classmethod
    def _cached_input_costs_as_input(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "cached_input" not in values and "input" in values:
            return {**values, "cached_input": values["input"]}
        return values

    @cached_property
    def version(self) -> str:
        """A short hash of these prices: equal cards have equal versions."""
        prices = [self.input, self.cached_input, self.output]
        factors = [self.multipliers.of(tier) for tier in Tier]
        text = " ".join(format(price.normalize(), "f") for price in prices + factors)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def _prices(self) -> Mapping[Tier, Prices]:
        return {
            tier: Prices(self.input, self.cached_input, self.output, self.multipliers.of(tier))
            for tier in Tier
        }

    def at(self, tier: Tier) -> Prices:
        """Return the prices of a request served at ``tier``."""
        return self._prices[tier]

    @cached_property
    def by_tier(self) -> Mapping[Tier, Mapping[str, Decimal]]:
        """The price of each kind of token at each tier."""
        return MappingProxyType(
            {
                tier: {
                    "input": EXACT.multiply(prices.input, prices.multiplier),
                    "cached_input": EXACT.multiply(prices.cached_input, prices.multiplier),
                    "output": EXACT.multiply(prices.output, prices.multiplier),
                }
                for tier, prices in self._prices.items()
            }
        )


def cost(usage: TokenUsage, card: RateCard, tier: Tier) -> Decimal:
    """Return what ``usage`` costs at ``tier``, in USD, exactly."""
    return card.at(tier).cost(usage)
