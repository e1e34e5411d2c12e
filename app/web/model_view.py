"""What pages say about a model, worked out from its snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from app.contracts.status import Availability, ModelSnapshot, ReplicaStatus
from app.core.pricing import RateCard
from app.core.tiers import PriorityMode, Tier

_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt_llm": "TensorRT-LLM"}

_STATES = {
    Availability.READY: ("Ready", "good"),
    Availability.ASLEEP: ("Asleep", ""),
    Availability.STARTING: ("Starting", ""),
    Availability.FAILED: ("Failed", "bad"),
    Availability.NOT_OFFERED: ("Not available", "bad"),
}

_NOT_SERVED = {
    Availability.ASLEEP: "The model is asleep. The first request wakes it.",
    Availability.STARTING: "Its engines are starting.",
    Availability.NOT_OFFERED: "No machine of this cluster can run its engines.",
}


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier of a model.

    Attributes:
        tier: the tier.
        held: whether a request would be served at it now.
        note: how it is delivered, or why it is not.
        input, cached_input, output: prices for a million tokens, in words; ``output`` is empty if
            the model generates no text.
        besides: its prices of images and recordings, as a sentence; empty if there are none.
        long: its prices of requests with long prompts, as a sentence; empty if they are the same.
    """

    tier: Tier
    held: bool
    note: str
    input: str
    cached_input: str
    output: str
    besides: str
    long: str


@dataclass(frozen=True, slots=True)
class PoolView:
    """The replicas of one pool that run the same engine; ``slots`` are those of all of them."""

    name: str
    engine: str
    replicas: int
    slots: int
    honours: bool
    preempts: bool


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model.

    Attributes:
        id: its id.
        owner: the part of the id before the last slash; empty if there is none.
        name: the rest of the id.
        aliases: other names that requests may use.
        state: its state in one or two words.
        state_kind: ``good``, ``bad``, or empty.
        chats: whether it generates text. If not, it only embeds.
        engines: the engines that serve it now, in words.
        context: the longest prompt and answer together, in words; empty if unknown.
        slots: how many requests it runs at once.
        tiers: the tiers, priority first.
        pools: the replicas that are ready, by pool.
    """

    id: str
    owner: str
    name: str
    aliases: tuple[str, ...]
    state: str
    state_kind: str
    chats: bool
    engines: str
    context: str
    slots: int
    tiers: tuple[TierView, ...]
    pools: tuple[PoolView, ...]

    @property
    def priority(self) -> TierView:
        """The tier ``priority``."""
        return self.tiers[0]

    @property
    def shown_tiers(self) -> tuple[TierView, ...]:
        """The tiers that cards show prices of."""
        return tuple(one for one in self.tiers if one.held) or self.tiers[1:2]

    @classmethod
    def of(cls, snapshot: ModelSnapshot) -> ModelView:
        """Return what is shown of a model."""
        state, kind = _STATES[snapshot.state]
        owner, _, name = snapshot.id.rpartition("/")
        replicas = snapshot.replicas
        return cls(
            id=snapshot.id,
            owner=owner,
            name=name,
            aliases=snapshot.aliases,
            state=state,
            state_kind=kind,
            chats=_generates(snapshot),
            engines=", ".join(engine_words(name) for name in snapshot.engines),
            context=count(snapshot.context_length, "token") if snapshot.context_length else "",
            slots=sum(one.slots for one in replicas),
            tiers=tuple(_tier(snapshot, tier) for tier in Tier),
            pools=tuple(_pools(replicas)),
        )


def engine_words(engine: str) -> str:
    """Return an engine's name as its project spells it."""
    if engine.startswith("simulated-"):
        of = engine.removeprefix("simulated-").replace("-", "_")
        return f"simulated {_ENGINES.get(of, of)}"
    return _ENGINES.get(engine, engine)


def price(value: Decimal) -> str:
    """Return a price in USD: two decimals, or as many as it has."""
    decimals = max(2, -int(value.normalize().as_tuple().exponent))
    return f"${value:,.{decimals}f}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where there are several."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _generates(snapshot: ModelSnapshot) -> bool:
    """Return whether a model generates text. While no replica is ready, that is not known."""
    return not snapshot.replicas or any(one.dialect.generates for one in snapshot.replicas)


def _tier(snapshot: ModelSnapshot, tier: Tier) -> TierView:
    prices = snapshot.settings.rate_card.by_tier[tier]
    held = snapshot.state is Availability.READY and tier in snapshot.service_tiers
    return TierView(
        tier=tier,
        held=held,
        note=_delivery(snapshot, tier) if held else why_not(snapshot, tier),
        input=price(prices["input"]),
        cached_input=price(prices["cached_input"]),
        output=price(prices["output"]) if _generates(snapshot) else "",
        besides=_besides(prices),
        long=_long(snapshot.settings.rate_card, tier),
    )


def _besides(prices: Mapping[str, Decimal]) -> str:
    kinds = (("cache_write", "written to the cache"), ("image", "an image"))
    shown = [
        f"{words} {price(prices[kind])}"
        for kind, words in (*kinds, ("audio_second", "a second of a recording"))
        if prices[kind] != (prices["input"] if kind == "cache_write" else 0)
    ]
    return f"{', '.join(shown).capitalize()}." if shown else ""


def _long(card: RateCard, tier: Tier) -> str:
    if (found := card.long_by_tier.get(tier)) is None:
        return ""
    above, prices = found
    words = [
        f"{name} {price(prices[kind])}"
        for name, kind in (("input", "input"), ("cached", "cached_input"), ("output", "output"))
    ]
    return f"With more than {above:,} prompt tokens: {', '.join(words)}."


def _delivery(snapshot: ModelSnapshot, tier: Tier) -> str:
    if tier is Tier.FLEX:
        return "Served last, when there is room."
    if tier is Tier.DEFAULT:
        return "Served in order of arrival."
    if snapshot.settings.tiers.priority is PriorityMode.QUEUE:
        return "Goes to the front of the queue."
    if snapshot.preempts:
        return "First in the queue and in the engine, where it takes the slots of lower tiers."
    return "First in the queue and in the engine."


def why_not(snapshot: ModelSnapshot, tier: Tier) -> str:
    """Return why a request would not be served at a tier now, as a sentence."""
    if not snapshot.settings.tiers.offer.offers(tier):
        return "The operator does not offer it for this model."
    if snapshot.state is Availability.READY:
        return "No running engine has native priority in force."
    if snapshot.sleep is not None and tier not in snapshot.sleep.tiers:
        return "Its engines had no native priority in force when they last ran."
    if snapshot.failure_reason is not None:
        return f"Its engines have failed to start: {snapshot.failure_reason}."
    if snapshot.state is Availability.STARTING and (phases := snapshot.start_phases):
        return f"Its engines are starting: {phases}."
    return _NOT_SERVED[snapshot.state]


def _pools(replicas: Iterable[ReplicaStatus]) -> Iterable[PoolView]:
    by_pool: dict[tuple[str, str], list[ReplicaStatus]] = {}
    for one in replicas:
        by_pool.setdefault((one.pool, one.dialect.engine), []).append(one)
    for (pool, engine), members in by_pool.items():
        yield PoolView(
            name=pool,
            engine=engine_words(engine),
            replicas=len(members),
            slots=sum(one.slots for one in members),
            honours=all(one.dialect.native_priority for one in members),
            preempts=all(one.preempts for one in members),
        )
