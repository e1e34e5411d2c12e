"""Usage records of every kind, for tests."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from fractions import Fraction

from hypothesis import strategies as st

from app.core.pricing import Multipliers, RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier, TierReason
from app.ledger.record import Origin, State, UsageRecord

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
CARD = RateCard(input="0.02", cached_input="0.01", output="0.04")


def new_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def origin(request_id: str | None = None, **values) -> Origin:
    fields = {
        "tenant": "acme",
        "key_id": "k1",
        "model": "m",
        "route": "chat/completions",
        "stream": True,
        "requested": Tier.PRIORITY,
        "arrived": NOON,
    }
    return Origin(request_id=request_id or new_id(), **{**fields, **values})


def opened(
    request_id: str | None = None, *, card: RateCard = CARD, served: Tier = Tier.PRIORITY, **values
) -> UsageRecord:
    of = origin(request_id, **values)
    lowered = of.requested is not None and of.requested is not served
    reason = TierReason.NO_REPLICA_HONOURS_PRIORITY if lowered else None
    decision = TierDecision(of.requested, served, reason, card)
    return UsageRecord.open(of, decision, engine="vllm", replica="r1", queue_s=0.25)


def completed(
    request_id: str | None = None, usage: TokenUsage | None = None, **values
) -> UsageRecord:
    record = opened(request_id, **values)
    return record.settle(
        State.COMPLETED,
        usage or TokenUsage(1000, 400, 250),
        ended=record.origin.arrived + timedelta(seconds=2),
        ttft_s=0.5,
    )


def shed(request_id: str | None = None) -> UsageRecord:
    return UsageRecord.not_served(
        origin(request_id), State.SHED, "queue_full", queue_s=0.0, ended=NOON
    )


tokens = st.integers(0, 10**9)
counts = st.just(0) | tokens
usages = st.builds(
    lambda prompt, cached, completion, written, *more: TokenUsage(
        prompt, min(cached, prompt), completion, min(written, max(prompt - cached, 0)), *more
    ),
    tokens, tokens, tokens, counts, counts, counts,
)  # fmt: skip
prices = st.decimals(0, 1_000_000, places=12)
token_prices = st.fixed_dictionaries(
    {"input": prices, "cached_input": prices, "output": prices}, optional={"cache_write": prices}
)
long_prices = st.builds(
    lambda above, own: {"above": above, **own}, st.integers(1, 10**9), token_prices
)


@st.composite
def _cards(draw) -> RateCard:
    # A tier's own prices have what the card has.
    others = draw(st.sets(st.sampled_from(["image", "audio_second"])))
    tier_prices = st.builds(
        lambda own, more: own | more,
        token_prices,
        st.fixed_dictionaries(dict.fromkeys(sorted(others), prices)),
    )
    return RateCard(
        **draw(tier_prices),
        long_context=draw(st.none() | long_prices),
        priority=draw(st.none() | tier_prices),
        multipliers=Multipliers(flex=draw(st.decimals(0, 10, places=4))),
    )


cards = _cards()
texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30
)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1)).map(
    lambda moment: moment.replace(tzinfo=UTC)
)


@st.composite
def records(draw) -> UsageRecord:
    """Settled records of every state."""
    of = Origin(
        request_id=new_id(),
        tenant=draw(texts),
        key_id=draw(texts),
        model=draw(texts),
        route=draw(st.sampled_from(["chat/completions", "embeddings"])),
        stream=draw(st.booleans()),
        requested=draw(st.none() | st.sampled_from(Tier)),
        arrived=draw(moments),
        ingress=draw(st.just("") | texts),
    )
    state = draw(st.sampled_from([state for state in State if state is not State.OPEN]))
    ended = of.arrived + timedelta(seconds=draw(st.floats(0, 4000)))
    if not state.served:
        return UsageRecord.not_served(of, state, draw(texts), queue_s=0.5, ended=ended)
    served = draw(st.sampled_from(Tier))
    decision = TierDecision(of.requested, served, TierReason.MODEL_DOES_NOT_OFFER_TIER, draw(cards))
    record = UsageRecord.open(
        of, decision, engine="vllm", replica=draw(texts), queue_s=draw(st.floats(0, 100))
    )
    return record.settle(
        state,
        draw(usages),
        ended=ended,
        ttft_s=draw(st.none() | st.floats(0, 100)),
        estimated=draw(st.booleans()),
        preemptions=draw(st.none() | st.integers(0, 40)),
    )


def total(of: list[UsageRecord]) -> Fraction:
    """The sum of their costs, by an arithmetic that cannot round."""
    return sum((Fraction(record.cost) for record in of), start=Fraction(0))
