"""Prices and costs of requests. Pure; money is ``Decimal`` throughout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from functools import cached_property
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

TOKENS_PER_SECOND: Final = 25
"""What a second of a recording counts against limits of tokens, as Qwen2-Audio encodes it. Engines
do not tell the tokens of what they transcribe."""

_NOTHING: Final = Decimal(0)
_ONE: Final = Decimal(1)
_MAX_PRICE: Final = 1_000_000
_MAX_DECIMALS: Final = 12


def _short(value: Decimal) -> Decimal:
    if value.is_finite() and -int(value.normalize().as_tuple().exponent) <= _MAX_DECIMALS:
        return value
    raise ValueError(f"at most {_MAX_DECIMALS} decimal places are allowed")


Price = Annotated[Decimal, Field(ge=0, le=_MAX_PRICE), AfterValidator(_short)]
"""USD per million tokens, per image or per second. The bound on decimals keeps every product exact
in ``Decimal``."""


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What one request used: tokens, and what is billed besides them.

    Attributes:
        prompt_tokens: the tokens of the prompt, all of them.
        cached_tokens: those that were read from the engine's prefix cache.
        completion_tokens: the generated tokens.
        cache_write_tokens: those of the prompt that were written to the prefix cache; none of them
            was read from it.
        images: the images of the prompt. Their tokens are part of ``prompt_tokens``.
        audio_seconds: the length of the recording that was transcribed, in begun seconds.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cache_write_tokens: int = 0
    images: int = 0
    audio_seconds: int = 0

    def __post_init__(self) -> None:
        possible = (
            0 <= self.cached_tokens <= self.prompt_tokens - self.cache_write_tokens
            and self.completion_tokens >= 0
            and self.cache_write_tokens >= 0
            and self.images >= 0
            and self.audio_seconds >= 0
        )
        if not possible:
            raise ValueError(f"impossible token counts: {self}")

    @property
    def limited_tokens(self) -> int:
        """How many tokens it counts against limits."""
        seconds = self.audio_seconds * TOKENS_PER_SECOND
        return self.prompt_tokens + self.completion_tokens + seconds

    @property
    def has_extras(self) -> bool:
        """Whether anything counts besides prompt, cached and generated tokens."""
        return bool(self.cache_write_tokens or self.images or self.audio_seconds)


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of one request: a rate card's, in USD per million tokens, and the served tier's
    factor on all of them.

    Attributes:
        input: for a token of the prompt that the engine computed.
        cached_input: for a token of the prompt that was in the engine's prefix cache.
        output: for a generated token.
        multiplier: the factor on all of them.
        cache_write: for a token of the prompt that the engine computed and wrote to its prefix
            cache.
        image: in USD per image.
        audio_second: in USD per second of a recording.
        long_from: the fewest prompt tokens of a long request; 0 for no such limit.
        long: the prices of all tokens of a long request.
    """

    input: Decimal
    cached_input: Decimal
    output: Decimal
    multiplier: Decimal
    cache_write: Decimal
    image: Decimal
    audio_second: Decimal
    long_from: int = 0
    long: Prices | None = None
    _each: tuple[Decimal, ...] = field(init=False, repr=False, compare=False)
    _texts: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The exponent of a cost is the same whether the factors or the sum come first.
        tokens = (self.input, self.cached_input, self.output, self.cache_write)
        each = [EXACT.scaleb(price, _TOKENS_EXPONENT) for price in tokens]
        each += (self.image, self.audio_second)
        object.__setattr__(
            self, "_each", tuple(EXACT.multiply(price, self.multiplier) for price in each)
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The prices and the factor with every digit, in the order of the arguments."""
        if self._texts is None:
            amounts = (
                self.input, self.cached_input, self.output, self.multiplier, self.cache_write,
                self.image, self.audio_second,
            )  # fmt: skip
            # Kept: most records have the same prices.
            object.__setattr__(self, "_texts", tuple(format(one, "f") for one in amounts))
        assert self._texts is not None
        return self._texts

    def of(self, usage: TokenUsage) -> Prices:
        """Return the prices that apply to ``usage``: the long ones, or these without them."""
        if self.long is None:
            return self
        return self._long_of(usage) or replace(self, long_from=0, long=None)

    def cost(self, usage: TokenUsage) -> Decimal:
        """Return what ``usage`` costs, in USD, exactly."""
        extras = usage.has_extras
        if not (usage.prompt_tokens or usage.completion_tokens or extras):
            return _NOTHING
        if (long := self._long_of(usage)) is not None:
            return long.cost(usage)
        fresh, cached, generated, written, image, second = self._each
        times, add = EXACT.multiply, EXACT.add
        computed = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
        prompt = add(times(computed, fresh), times(usage.cached_tokens, cached))
        whole = add(prompt, times(usage.completion_tokens, generated))
        if extras:
            whole = add(whole, times(usage.cache_write_tokens, written))
            whole = add(whole, times(usage.images, image))
            whole = add(whole, times(usage.audio_seconds, second))
        return whole

    def _long_of(self, usage: TokenUsage) -> Prices | None:
        """Return the prices of a long request; ``None`` if ``usage`` is not that of one."""
        return self.long if usage.prompt_tokens >= self.long_from else None


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
                return _ONE


class TokenPrices(Settings):
    """Prices in USD per million tokens."""

    input: Price = Field(description="Prompt tokens.")
    cached_input: Price = Field(
        default=Decimal(0),
        description="Prompt tokens found in the engine's prefix cache. Not set: the price of "
        "`input`.",
    )
    cache_write: Price = Field(
        default=Decimal(0),
        description="Prompt tokens that the engine has written to its prefix cache, where it "
        "reports them. Not set: the price of `input`.",
    )
    output: Price = Field(description="Generated tokens.")

    @model_validator(mode="before")
    @classmethod
    def _cache_costs_as_input(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "input" in values:
            return {**dict.fromkeys(("cached_input", "cache_write"), values["input"]), **values}
        return values

    def flat(self, multiplier: Decimal, image: Decimal, audio_second: Decimal) -> Prices:
        """Return these prices with a factor, whatever the length of the prompt."""
        return Prices(
            self.input, self.cached_input, self.output, multiplier, self.cache_write, image,
            audio_second,
        )  # fmt: skip


class LongContext(TokenPrices):
    """The prices of requests with long prompts."""

    above: int = Field(
        gt=0,
        description="A request with more prompt tokens than this has these prices for all of its "
        "tokens. Tokens found in the prefix cache count.",
    )


class TierPrices(TokenPrices):
    """The prices of one tier, of its own instead of a factor on those of `default`."""

    image: Price | None = Field(
        default=None,
        description="USD for each image in a prompt, besides its tokens. Not set: nothing besides "
        "them.",
    )
    audio_second: Price | None = Field(
        default=None,
        description="USD for each second of a transcribed recording. Not set: the model "
        "transcribes nothing, unless it is free.",
    )
    long_context: LongContext | None = Field(
        default=None, description="Prices of requests with long prompts. Not set: the same."
    )

    def prices(self, multiplier: Decimal) -> Prices:
        """Return these prices with a factor, those of long prompts included."""
        others = (multiplier, self.image or _NOTHING, self.audio_second or _NOTHING)
        short = self.flat(*others)
        if self.long_context is None:
            return short
        long = self.long_context
        return replace(short, long_from=long.above + 1, long=long.flat(*others))


class RateCard(TierPrices):
    """The prices of one model, in USD per million tokens where no other unit is named."""

    free: bool = Field(
        default=False,
        description="Whether the model costs nothing. No price is set then. Otherwise `input` and "
        "`output` must be set, so that no model is free because a line was forgotten.",
    )
    multipliers: Multipliers = Field(
        default=Multipliers(), description="Factor on all prices, by tier; see below."
    )
    priority: TierPrices | None = Field(
        default=None,
        description="Own prices of `priority`, instead of its factor; see below.",
    )
    flex: TierPrices | None = Field(
        default=None, description="Own prices of `flex`, instead of its factor; see below."
    )

    @model_validator(mode="before")
    @classmethod
    def _free_without_prices(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("free") is not True:
            return values
        if priced := [name for name in values if name != "free"]:
            raise ValueError(f"the card says `free: true`, so {priced[0]!r} may not be set")
        return {"free": True, "input": 0, "output": 0}

    @model_validator(mode="after")
    def _one_price_for_each_tier(self) -> RateCard:
        for tier in (Tier.PRIORITY, Tier.FLEX):
            if self._own(tier) is not None and tier.value in self.multipliers.model_fields_set:
                raise ValueError(f"{tier.value} has own prices and a multiplier: leave one out")
        return self

    @model_validator(mode="after")
    def _own_prices_are_whole(self) -> RateCard:
        """Refuse a tier's own prices that would make free what the card has a price for."""
        for tier in (Tier.PRIORITY, Tier.FLEX):
            if (own := self._own(tier)) is None:
                continue
            for name in ("image", "audio_second"):
                if (getattr(own, name) is None) is not (getattr(self, name) is None):
                    raise ValueError(
                        f"the card and its prices of {tier.value} both have {name!r}, or neither"
                    )
        return self

    def _own(self, tier: Tier) -> TierPrices | None:
        return {Tier.PRIORITY: self.priority, Tier.FLEX: self.flex}.get(tier)

    @cached_property
    def version(self) -> str:
        """A short hash of these prices: equal cards have equal versions."""
        text = " ".join(" ".join(_words(self.at(tier))) for tier in Tier)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def _prices(self) -> Mapping[Tier, Prices]:
        def of(tier: Tier) -> Prices:
            own = self._own(tier)
            return self.prices(self.multipliers.of(tier)) if own is None else own.prices(_ONE)

        return {tier: of(tier) for tier in Tier}

    @cached_property
    def prices_images(self) -> bool:
        """Whether an image costs something besides its tokens, at any tier."""
        return any(one.image for one in self._prices.values())

    @property
    def prices_audio(self) -> bool:
        """Whether it says what a second of a recording costs."""
        return self.free or self.audio_second is not None

    def at(self, tier: Tier) -> Prices:
        """Return the prices of a request served at ``tier``."""
        return self._prices[tier]

    @cached_property
    def by_tier(self) -> Mapping[Tier, Mapping[str, Decimal]]:
        """The price of each kind of usage at each tier, of requests whose prompts are not long."""
        # A plain dictionary: a card is pickled with what it has worked out.
        return {tier: _by_kind(one) for tier, one in self._prices.items()}

    @cached_property
    def long_by_tier(self) -> Mapping[Tier, tuple[int, Mapping[str, Decimal]]]:
        """The prompt tokens above which a request is long, and its prices; tiers without are left
        out.
        """
        found = ((tier, one.long_from - 1, one.long) for tier, one in self._prices.items())
        return {tier: (above, _by_kind(long)) for tier, above, long in found if long is not None}


FREE: Final = RateCard.model_validate({"free": True})
"""The card of a model that costs nothing."""


def _by_kind(prices: Prices) -> Mapping[str, Decimal]:
    """Return the price of each kind of usage, its multiplier included."""
    kinds = {
        "input": prices.input,
        "cached_input": prices.cached_input,
        "output": prices.output,
        "cache_write": prices.cache_write,
        "image": prices.image,
        "audio_second": prices.audio_second,
    }
    return {kind: EXACT.multiply(price, prices.multiplier) for kind, price in kinds.items()}


def _words(prices: Prices) -> Iterator[str]:
    """Yield all numbers of them, each written in one way."""
    for price in (prices.input, prices.cached_input, prices.output, prices.multiplier):
        yield format(price.normalize(), "f")
    # Only where they differ from what they are if not set: cards from before they could be set keep
    # their versions.
    others = (prices.cache_write, prices.image, prices.audio_second)
    for name, price, usual in zip("wia", others, (prices.input, 0, 0), strict=True):
        if price != usual:
            yield f"{name}{format(price.normalize(), 'f')}"
    if prices.long is not None:
        yield f"from {prices.long_from}"
        yield from _words(prices.long)


def cost(usage: TokenUsage, card: RateCard, tier: Tier) -> Decimal:
    """Return what ``usage`` costs at ``tier``, in USD, exactly."""
    return card.at(tier).cost(usage)
