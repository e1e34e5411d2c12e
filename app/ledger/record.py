"""The usage record: origin, outcome, usage and cost of one request. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, Self

import orjson

from app.core.pricing import Prices, TokenUsage
from app.core.tier_decision import TierDecision, and_raised, is_raised
from app.core.tiers import Tier

NOTHING_USED: Final = TokenUsage(0, 0, 0)
_FREE: Final = Decimal(0)
_NO_OFFSET: Final = timedelta(0)
MAX_TEXT: Final = 300
"""Longest text in a record, in characters."""
VERSION: Final = 1
"""The version of a record's JSON (``app.ledger.reading``)."""
_BEGIN: Final = b'{"version":%d,' % VERSION


USED: Final = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "cache_write_tokens", "images",
    "audio_seconds",
)  # fmt: skip
"""The fields with what a request used, in the order of ``TokenUsage``."""
PRICES: Final = (
    "input_price", "cached_input_price", "output_price", "multiplier", "cache_write_price",
    "image_price", "audio_second_price",
)  # fmt: skip
"""The fields with its prices, in the order of ``Prices``."""


def with_former_prices(values: Sequence[Decimal | None]) -> Sequence[Any]:
    """Return a served request's values of ``PRICES``, also of a record from before the last three.

    Such a record has no usage with these prices.
    """
    if values[-1] is None:
        return [*values[:-3], values[0], _FREE, _FREE]
    return values


class State(StrEnum):
    """The state of a request."""

    OPEN = "open"
    """It is being answered. This is the only state that changes, and it changes once."""
    COMPLETED = "completed"
    """The answer is complete."""
    INTERRUPTED = "interrupted"
    """The answer was cut off: the client left, or the engine or the ingress was lost."""
    FAILED = "failed"
    """It reached an engine, and failed."""
    SHED = "shed"
    """It was refused by the queue."""
    REFUSED = "refused"
    """It was refused before the queue, for example because of a limit of its key."""
    ABANDONED = "abandoned"
    """It ended before an engine received it, and nobody refused it: its client has left, or the
    ingress failed. The ledger has no record of it."""

    @property
    def served(self) -> bool:
        """Whether the request reached an engine."""
        return self not in _NOT_SERVED


_NOT_SERVED: Final = frozenset({State.SHED, State.REFUSED, State.ABANDONED})


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a request at its arrival.

    Attributes:
        request_id: the unique id of the request and its record.
        tenant: the tenant that is billed; empty if the ingress requires no keys.
        key_id: the public part of the API key, or empty.
        model: the model's id, or the name of its adapter that was asked for.
        route: the path below ``/v1/``.
        stream: whether the answer is streamed.
        requested: the requested tier; ``None`` for none, or ``auto``.
        arrived: when the request arrived, in UTC. Its day is the day on the bill.
        ingress: the name of the ingress process that records it, by which spend is added up
            (``app.tenants.spending``); empty in records from before budgets.
        parent: the id of the model that an adapter belongs to; empty if ``model`` is none. It is
            not stored.
    """

    request_id: str
    tenant: str
    key_id: str
    model: str
    route: str
    stream: bool
    requested: Tier | None
    arrived: datetime
    ingress: str = ""
    parent: str = field(default="", compare=False)

    @property
    def base_model(self) -> str:
        """The id of the model whose engines were asked."""
        return self.parent or self.model

    def __post_init__(self) -> None:
        if not self.request_id:
            raise ValueError("a record has a request id")
        _check_texts(
            self.request_id, self.tenant, self.key_id, self.model, self.route, self.ingress
        )
        if self.arrived.utcoffset() != _NO_OFFSET:
            raise ValueError("times are in UTC")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request on the bill.

    Attributes:
        origin: the request, as known at its arrival.
        state: its state.
        served: the tier that was echoed and is billed; ``None`` if it reached no engine.
        reason: why the served tier is not the requested one, or why there is no answer. For a
            request that was raised to a better tier it begins with ``start_within_passed``.
        engine: the name of the engine that answered, or empty.
        replica: the engine replica, or empty.
        usage: the tokens that it used, and what else is billed.
        prices: its prices, from the rate card at its decision; ``None`` if it was not served. A
            settled record has those that apply to its tokens.
        rate_card: that card's version, or empty.
        cost: the exact cost of the tokens at the prices, in USD.
        queue_s: how long it waited in the queue, in seconds.
        ttft_s: from arrival to the first byte of the answer, in seconds; ``None`` without one.
        ended: when it ended, in UTC; ``None`` while it is open.
        duration_s: from arrival to the end, in seconds; ``None`` while it is open.
        usage_estimated: whether the tokens are Frontline's estimate or clamp, and not the engine's
            own final count.
        preemptions: how often the engine has suspended it; ``None`` if that is not known.
    """

    origin: Origin
    state: State
    served: Tier | None
    reason: str | None
    engine: str
    replica: str
    usage: TokenUsage
    prices: Prices | None
    rate_card: str
    queue_s: float
    ttft_s: float | None
    ended: datetime | None
    usage_estimated: bool = False
    preemptions: int | None = None
    cost: Decimal = field(init=False)
    duration_s: float | None = field(init=False)

    def __post_init__(self) -> None:
        _check_texts(self.reason or "", self.engine, self.replica, self.rate_card)
        cost = _FREE
        if self.state.served:
            if self.served is None or self.prices is None:
                raise ValueError("a served request has a tier and prices")
            cost = self.prices.cost(self.usage)
        elif self.served or self.prices or self.usage != NOTHING_USED or self.usage_estimated:
            raise ValueError("a request that was not served has no tier, prices or tokens")
        elif self.preemptions is not None:
            raise ValueError("a request that was not served was not suspended")
        object.__setattr__(self, "cost", cost)
        ended, duration_s = self.ended, None
        if (self.state is State.OPEN) is not (ended is None):
            raise ValueError("a record is open until it has ended")
        if ended is not None:
            if ended.utcoffset() != _NO_OFFSET:
                raise ValueError("times are in UTC")
            duration_s = (ended - self.origin.arrived).total_seconds()
        object.__setattr__(self, "duration_s", duration_s)
        if (self.preemptions or 0) < 0:
            raise ValueError("a count is not negative")
        for seconds in (self.queue_s, self.ttft_s or 0.0):
            if not 0 <= seconds < math.inf:
                raise ValueError("times are not negative")

    @classmethod
    def open(
        cls,
        origin: Origin,
        decision: TierDecision,
        *,
        engine: str,
        replica: str,
        queue_s: float,
        usage: TokenUsage = NOTHING_USED,
    ) -> Self:
        """Return the open record of a request that was placed on an engine replica."""
        if decision.requested is not origin.requested:
            raise ValueError("the decision is about another request")
        prices = decision.rate_card.at(decision.served)
        return cls(
            origin, State.OPEN, decision.served, decision.why, engine, replica, usage, prices,
            decision.rate_card.version, max(queue_s, 0.0), None, None,
        )  # fmt: skip

    @classmethod
    def not_served(
        cls, origin: Origin, state: State, reason: str, *, queue_s: float, ended: datetime
    ) -> Self:
        """Return the record of a request that was shed or refused; its cost is 0."""
        return cls(
            origin, state, None, reason, "", "", NOTHING_USED, None, "", max(queue_s, 0.0), None,
            ended,
        )  # fmt: skip

    @classmethod
    def settled(
        cls,
        origin: Origin,
        decision: TierDecision,
        state: State,
        usage: TokenUsage,
        *,
        engine: str,
        replica: str,
        queue_s: float,
        ended: datetime,
        ttft_s: float | None = None,
        reason: str | None = None,
        estimated: bool = False,
        preemptions: int | None = None,
    ) -> Self:
        """Return the same as ``open`` and then ``settle``, in one step."""
        if decision.requested is not origin.requested:
            raise ValueError("the decision is about another request")
        reason = _why_ended(State.OPEN, state, decision.why, reason)
        return cls(
            origin, state, decision.served, reason, engine, replica, usage,
            decision.rate_card.at(decision.served).of(usage), decision.rate_card.version,
            max(queue_s, 0.0), ttft_s, max(ended, origin.arrived), estimated, preemptions,
        )  # fmt: skip

    def settle(
        self,
        state: State,
        usage: TokenUsage,
        *,
        ended: datetime,
        ttft_s: float | None = None,
        reason: str | None = None,
        estimated: bool = False,
        preemptions: int | None = None,
    ) -> Self:
        """Return the settled form of an open record.

        ``reason`` is why the answer was cut off or failed; without it the tier's own reason stays.
        An answer that was cut off is billed, so its record says in any case whether the request was
        raised.
        ``estimated`` means that ``usage`` is not the engine's own final count.
        """
        reason = _why_ended(self.state, state, self.reason, reason)
        # Not `replace`, which iterates over the fields for every request.
        return type(self)(
            self.origin, state, self.served, reason, self.engine, self.replica,
            usage, self.prices and self.prices.of(usage), self.rate_card, self.queue_s, ttft_s,
            max(ended, self.origin.arrived), estimated, preemptions,
        )  # fmt: skip

    def to_fields(self) -> dict[str, Any]:
        """Return the record as a flat mapping with the names of the store's columns.

        Amounts are ``Decimal`` and times ``datetime``; tiers and states are strings.
        """
        origin, usage = self.origin, self.usage
        prices = self.prices and self.prices.of(usage)
        return {
            "request_id": origin.request_id,
            "tenant": origin.tenant,
            "key_id": origin.key_id,
            "model": origin.model,
            "route": origin.route,
            "stream": origin.stream,
            "requested_tier": origin.requested and origin.requested.value,
            "served_tier": self.served and self.served.value,
            "state": self.state.value,
            "reason": self.reason,
            "engine": self.engine,
            "replica": self.replica,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "images": usage.images,
            "audio_seconds": usage.audio_seconds,
            "input_price": prices and prices.input,
            "cached_input_price": prices and prices.cached_input,
            "output_price": prices and prices.output,
            "cache_write_price": prices and prices.cache_write,
            "image_price": prices and prices.image,
            "audio_second_price": prices and prices.audio_second,
            "multiplier": prices and prices.multiplier,
            "rate_card": self.rate_card,
            "cost": self.cost,
            "queue_s": self.queue_s,
            "ttft_s": self.ttft_s,
            "duration_s": self.duration_s,
            "arrived": origin.arrived,
            "ended": self.ended,
            "usage_estimated": self.usage_estimated,
            "preemptions": self.preemptions,
            "ingress": origin.ingress,
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Return the record that ``to_fields`` was called on.

        Raises:
            ValueError: its cost is not that of its tokens at its prices, or a value is impossible.
        """
        requested, served = fields["requested_tier"], fields["served_tier"]
        origin = Origin(
            fields["request_id"], fields["tenant"], fields["key_id"], fields["model"],
            fields["route"], fields["stream"], requested and Tier(requested), fields["arrived"],
            fields["ingress"],
        )  # fmt: skip
        usage = TokenUsage(*(fields[name] for name in USED))
        prices = None
        if served is not None:
            prices = Prices(*with_former_prices([fields[name] for name in PRICES]))
        record = cls(
            origin, State(fields["state"]), served and Tier(served), fields["reason"],
            fields["engine"], fields["replica"], usage, prices, fields["rate_card"],
            fields["queue_s"], fields["ttft_s"], fields["ended"], fields["usage_estimated"],
            fields["preemptions"],
        )  # fmt: skip
        if record.cost != fields["cost"]:
            raise ValueError("the cost is that of the tokens at the prices")
        return record

    def to_json(self) -> bytes:
        """Return ``to_fields`` as JSON, with ``VERSION``; amounts are strings with every digit."""
        fields = self.to_fields()
        if self.prices is not None:
            fields.update(zip(PRICES, self.prices.of(self.usage).texts, strict=True))
        return _BEGIN + orjson.dumps(fields, default=_text_of_amount)[1:]


def _why_ended(before: State, state: State, why_tier: str | None, why: str | None) -> str | None:
    """Return the reason in a settled record; see ``UsageRecord.settle``."""
    if before is not State.OPEN or not state.served or state is State.OPEN:
        raise ValueError(f"a record that is {before} cannot become {state}")
    if why and state is State.INTERRUPTED and is_raised(why_tier):
        return and_raised(why)
    return why or why_tier


def now_utc() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def is_stored_text(text: str) -> bool:
    """Return whether a text that is not empty may be in a record; PostgreSQL rejects NUL."""
    return 0 < len(text) <= MAX_TEXT and "\0" not in text


def _text_of_amount(value: object) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    raise TypeError(type(value).__name__)


def _check_texts(*texts: str) -> None:
    # PostgreSQL rejects NUL in text, and a record that no store accepts would block the others.
    whole = "".join(texts)
    if (len(whole) > MAX_TEXT and max(map(len, texts)) > MAX_TEXT) or "\0" in whole:
        raise ValueError(f"text in a record is at most {MAX_TEXT} characters, without NUL")
