from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier, TierReason
from app.ledger.reading import read_record
from app.ledger.record import NOTHING_USED, PRICES, USED, State, UsageRecord
from tests.support.records import CARD, NOON, cards, completed, opened, origin, records, usages

pytestmark = pytest.mark.unit


@given(records())
def test_a_record_comes_back_from_json_with_every_digit(record):
    assert read_record(record.to_json()) == record


@given(usages, cards, st.sampled_from(Tier))
def test_the_cost_is_exact_however_long_the_prices(usage, card, tier):
    record = opened(card=card, served=tier).settle(State.COMPLETED, usage, ended=NOON)
    own = {Tier.PRIORITY: card.priority, Tier.FLEX: card.flex}.get(tier)
    prices, factor = own or card, 1 if own else Fraction(card.multipliers.of(tier))
    besides = usage.images * Fraction(prices.image or 0)
    besides += usage.audio_seconds * Fraction(prices.audio_second or 0)
    if prices.long_context is not None and usage.prompt_tokens > prices.long_context.above:
        prices = prices.long_context
    fresh = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
    expected = (
        fresh * Fraction(prices.input)
        + usage.cached_tokens * Fraction(prices.cached_input)
        + usage.cache_write_tokens * Fraction(prices.cache_write)
        + usage.completion_tokens * Fraction(prices.output)
    )
    assert Fraction(record.cost) == (expected / 10**6 + besides) * factor


@given(records())
def test_a_record_of_a_journal_from_before_there_were_more_prices_is_read(record):
    fields = orjson.loads(record.to_json())
    for name in (*USED[3:], *PRICES[4:]):
        del fields[name]
    usage = TokenUsage(*(fields[name] for name in USED[:3]))
    prices = record.prices
    if prices is not None:
        prices = replace(
            prices, cache_write=prices.input, image=Decimal(0), audio_second=Decimal(0)
        )
    former = replace(record, usage=usage, prices=prices)
    fields["cost"] = format(former.cost, "f")
    assert read_record(orjson.dumps(fields)) == former


def test_a_worked_example():
    record = completed(usage=TokenUsage(1000, 400, 250))
    assert (record.served, record.cost) == (Tier.PRIORITY, Decimal("0.000039"))
    assert record.duration_s == 2.0
    assert record.rate_card == CARD.version


@given(st.decimals(allow_nan=False, allow_infinity=False).filter(lambda c: c != completed().cost))
def test_a_record_with_another_cost_cannot_be_made(cost):
    # From Python 3.13 on it is a TypeError.
    with pytest.raises((ValueError, TypeError), match="cost"):
        replace(completed(), cost=cost)


@pytest.mark.parametrize("state", [State.SHED, State.REFUSED])
def test_what_was_not_served_has_no_tier_and_costs_nothing(state):
    record = UsageRecord.not_served(origin(), state, "queue_full", queue_s=0, ended=NOON)
    assert (record.served, record.cost, record.usage) == (None, 0, NOTHING_USED)
    with pytest.raises(ValueError, match="not served"):
        replace(record, served=Tier.DEFAULT)
    with pytest.raises(ValueError, match="not served"):
        replace(record, usage=TokenUsage(1, 0, 0))
    with pytest.raises(ValueError, match="tier and prices"):
        replace(record, state=State.COMPLETED)


def test_only_what_was_served_can_be_estimated():
    usage = TokenUsage(1000, 400, 250)
    record = opened().settle(State.INTERRUPTED, usage, ended=NOON, estimated=True)
    assert record.usage_estimated and not completed().usage_estimated
    refused = UsageRecord.not_served(origin(), State.SHED, "queue_full", queue_s=0, ended=NOON)
    with pytest.raises(ValueError, match="not served"):
        replace(refused, usage_estimated=True)
    with pytest.raises(ValueError, match="not suspended"):
        replace(refused, preemptions=0)
    with pytest.raises(ValueError, match="not negative"):
        replace(completed(), preemptions=-1)


def test_a_record_settles_once():
    record = completed()
    with pytest.raises(ValueError, match="cannot become"):
        record.settle(State.INTERRUPTED, NOTHING_USED, ended=NOON)
    for state in (State.OPEN, State.SHED):
        with pytest.raises(ValueError, match="cannot become"):
            opened().settle(state, NOTHING_USED, ended=NOON)


def test_an_open_record_has_not_ended_and_a_settled_one_has():
    with pytest.raises(ValueError, match="open until"):
        replace(completed(), ended=None)
    with pytest.raises(ValueError, match="open until"):
        replace(opened(), ended=NOON)


def test_a_clock_that_was_set_back_makes_no_negative_times():
    early = NOON - timedelta(hours=1)
    assert opened().settle(State.COMPLETED, NOTHING_USED, ended=early).duration_s == 0
    with pytest.raises(ValueError, match="negative"):
        replace(completed(), queue_s=-1.0)


@pytest.mark.parametrize(
    "arrived", [datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))]
)
def test_times_are_in_utc(arrived):
    with pytest.raises(ValueError, match="UTC"):
        origin(arrived=arrived)
    with pytest.raises(ValueError, match="UTC"):
        replace(completed(), ended=arrived)
    assert origin(arrived=arrived.replace(tzinfo=UTC))


@pytest.mark.parametrize("text", ["a\0b", "x" * 301])
def test_text_that_no_store_takes_is_refused(text):
    for field in ("request_id", "tenant", "model", "key_id"):
        with pytest.raises(ValueError, match="NUL"):
            origin(**{field: text})
    with pytest.raises(ValueError, match="NUL"):
        replace(completed(), reason=text)


def test_the_tier_reason_stays_unless_there_is_a_nearer_one():
    record = opened(served=Tier.DEFAULT)
    ended = {"usage": NOTHING_USED, "ended": NOON}
    assert record.settle(State.COMPLETED, **ended).reason == "no_replica_honours_priority"
    broken = record.settle(State.FAILED, **ended, reason="engine_error")
    assert broken.reason == "engine_error"


@pytest.mark.parametrize("reason", [None, TierReason.OVER_PRIORITY_SHARE])
def test_what_is_billed_says_that_it_was_raised_however_it_ended(reason):
    decision = TierDecision(Tier.FLEX, Tier.DEFAULT, reason, CARD, raised=True)
    record = UsageRecord.open(
        origin(requested=Tier.FLEX), decision, engine="vllm", replica="r", queue_s=1.0
    )
    ended = {"usage": NOTHING_USED, "ended": NOON}
    why = "start_within_passed" if reason is None else f"start_within_passed, {reason}"
    assert record.settle(State.COMPLETED, **ended).reason == why
    cut = record.settle(State.INTERRUPTED, **ended, reason="client_gone")
    assert cut.reason == "start_within_passed, client_gone"
    assert record.settle(State.FAILED, **ended, reason="engine_error").reason == "engine_error"
    assert read_record(cut.to_json()) == cut
