import pickle
import re
from dataclasses import astuple
from decimal import Decimal
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import FREE, Multipliers, RateCard, TokenUsage, cost
from app.core.settings import SettingsError
from app.core.tiers import Tier

pytestmark = pytest.mark.unit

tokens = st.integers(0, 10_000_000)
counts = st.just(0) | tokens
usages = st.builds(
    lambda prompt, cached, completion, written, *more: TokenUsage(
        prompt, min(cached, prompt), completion, min(written, max(prompt - cached, 0)), *more
    ),
    tokens, tokens, tokens, counts, counts, counts,
)  # fmt: skip
prices = st.decimals(0, 1000, places=6)
NAMES = ("input", "cached_input", "output", "cache_write", "image", "audio_second")
cards = st.builds(
    lambda *each: RateCard(**dict(zip(NAMES, each, strict=True))), *[prices] * len(NAMES)
)


@given(usages, cards)
def test_priority_costs_exactly_one_and_a_half_times_default(usage, card):
    assert cost(usage, card, Tier.PRIORITY) == Decimal("1.5") * cost(usage, card, Tier.DEFAULT)
    assert cost(usage, card, Tier.FLEX) == Decimal("0.8") * cost(usage, card, Tier.DEFAULT)


@given(usages, usages, cards, st.sampled_from(Tier))
def test_costs_add_up(one, other, card, tier):
    both = TokenUsage(*map(add, astuple(one), astuple(other)))
    assert cost(both, card, tier) == cost(one, card, tier) + cost(other, card, tier)


@given(usages, cards, st.sampled_from(Tier))
def test_a_cost_has_the_digits_of_the_sum_at_the_prices_times_the_factor(usage, card, tier):
    """The ledger writes every digit, trailing zeros included."""
    fresh = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
    sums = fresh * card.input + usage.cached_tokens * card.cached_input
    sums += usage.cache_write_tokens * card.cache_write
    whole = (sums + usage.completion_tokens * card.output).scaleb(-6)
    whole += usage.images * card.image + usage.audio_seconds * card.audio_second
    if usage != TokenUsage(0, 0, 0):
        assert str(cost(usage, card, tier)) == str(whole * card.multipliers.of(tier))


def test_a_worked_example():
    card = RateCard(input="0.02", cached_input="0.01", output="0.04")
    usage = TokenUsage(prompt_tokens=1000, cached_tokens=400, completion_tokens=250)
    # 600 x 0.02 + 400 x 0.01 + 250 x 0.04 = 26 millionths of a dollar
    assert cost(usage, card, Tier.DEFAULT) == Decimal("0.000026")
    assert cost(usage, card, Tier.PRIORITY) == Decimal("0.000039")
    assert cost(usage, card, Tier.FLEX) == Decimal("0.0000208")


def test_a_worked_example_with_all_there_is():
    card = RateCard(input=1, cached_input="0.5", cache_write="1.25", output=4, image="0.002",
                    audio_second="0.0001")  # fmt: skip
    usage = TokenUsage(1000, 400, 250, cache_write_tokens=200, images=3, audio_seconds=60)
    # 400 x 1 + 400 x 0.5 + 200 x 1.25 + 250 x 4 = 1850 millionths; 3 x 0.002; 60 x 0.0001
    assert cost(usage, card, Tier.DEFAULT) == Decimal("0.00185") + Decimal("0.012")
    assert cost(usage, card, Tier.PRIORITY) == Decimal("1.5") * Decimal("0.01385")


def test_a_recording_and_an_image_cost_something_without_tokens():
    card = RateCard(input=1, output=1, image=2, audio_second=3)
    assert cost(TokenUsage(0, 0, 0, images=1), card, Tier.DEFAULT) == 2
    assert cost(TokenUsage(0, 0, 0, audio_seconds=1), card, Tier.DEFAULT) == 3


def test_prices_written_as_numbers_in_yaml_are_exact():
    card = RateCard.load({"input": 0.1, "output": 0.3}, "rate_card")
    assert (card.input, card.output) == (Decimal("0.1"), Decimal("0.3"))


def test_cached_input_costs_as_input_if_not_set():
    assert RateCard(input="0.5", output="1").cached_input == Decimal("0.5")
    assert RateCard(input="0.5", cached_input="0", output="1").cached_input == 0


def test_cache_writes_cost_as_input_if_not_set_in_long_prompts_and_own_prices_too():
    assert RateCard(input="0.5", cached_input="0", output="1").cache_write == Decimal("0.5")
    assert RateCard(input="0.5", cache_write=0, output="1").cache_write == 0
    card = RateCard(**OWN)
    assert card.long_context and card.long_context.cache_write == 2
    assert card.priority and card.priority.cache_write == 3


@given(usages)
def test_a_card_without_the_newer_prices_costs_what_it_did(usage):
    former = TokenUsage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    card = RateCard(input="0.5", cached_input="0.1", output="1")
    assert cost(usage, card, Tier.DEFAULT) == cost(former, card, Tier.DEFAULT)
    assert card.version == "ffaea1108f60"


def test_equal_cards_have_equal_versions_and_others_do_not():
    card = RateCard(input="0.50", output="1")
    assert card.version == RateCard(input="0.5", output="1.00").version
    assert card.version != RateCard(input="0.51", output="1").version
    assert card.version != RateCard(input="0.5", output="1", multipliers={"flex": "0.7"}).version
    long = RateCard(input="0.5", output="1", long_context=LONG)
    assert len({card.version, long.version, RateCard(**OWN).version}) == 3


LONG = {"above": 1000, "input": "2", "cached_input": "1", "output": "4"}
OWN = {
    "input": "0.5",
    "output": "1",
    "long_context": LONG,
    "priority": {"input": "3", "output": "5"},
}


@given(usages, st.integers(1, 10_000_000), st.sampled_from([Tier.DEFAULT, Tier.FLEX]))
def test_all_tokens_of_a_long_request_have_the_long_prices(usage, above, tier):
    card = RateCard(input="0.5", output="1", long_context=LONG | {"above": above})
    is_long = usage.prompt_tokens > above
    plain = RateCard(input="2", cached_input="1", output="4") if is_long else RateCard(**SHORT)
    assert cost(usage, card, tier) == cost(usage, plain, tier)
    applied = card.at(tier).of(usage)
    assert applied == plain.at(tier) and applied.cost(usage) == cost(usage, card, tier)


SHORT = {"input": "0.5", "output": "1"}


@given(usages, st.integers(1, 10_000_000))
def test_own_prices_of_a_tier_replace_its_multiplier_and_no_other(usage, above):
    own = {"input": "3", "output": "5"}
    card = RateCard(**OWN | {"long_context": LONG | {"above": above}})
    assert cost(usage, card, Tier.PRIORITY) == cost(usage, RateCard(**own), Tier.DEFAULT)
    assert cost(usage, card, Tier.FLEX) == Decimal("0.8") * cost(usage, card, Tier.DEFAULT)
    assert card.long_by_tier.keys() == {Tier.DEFAULT, Tier.FLEX}
    assert card.by_tier[Tier.PRIORITY]["output"] == 5


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({}, "rate_card.input: must be set\nrate_card.output: must be set"),
        ({"input": 1}, "rate_card.output: must be set"),
        ({"free": False}, "rate_card.input: must be set"),
        ({"free": True, "input": 0}, "says `free: true`, so 'input' may not be set"),
        ({"input": 1, "output": 1, "long_context": {"above": 9}}, "long_context.input: must be"),
        (OWN | {"image": 1}, "its prices of priority both have 'image', or neither"),
        (
            SHORT | {"flex": SHORT | {"audio_second": 1}},
            "its prices of flex both have 'audio_second', or neither",
        ),
        (OWN | {"multipliers": {"priority": 2}}, "priority has own prices and a multiplier"),
    ],
)
def test_no_model_is_free_by_accident_and_no_price_is_given_twice(card, message):
    """At 30f14eb a card without prices was free."""
    with pytest.raises(SettingsError, match=re.escape(message)):
        RateCard.load(card, "rate_card")


@given(cards, st.sampled_from(["by_tier", "long_by_tier", "version"]))
def test_a_card_is_pickled_whatever_was_asked_of_it(card, asked):
    """a94f7f2: not once its prices were shown, as in the models list; `FREE` is a shared one."""
    assert getattr(card, asked) is not None
    assert pickle.loads(pickle.dumps(card)) == card


def test_a_model_may_be_free():
    assert RateCard.load({"free": True}, "rate_card") == FREE
    assert cost(TokenUsage(10, 5, 10), FREE, Tier.PRIORITY) == 0


def test_one_multiplier_may_be_set_alone():
    factors = Multipliers(priority="2")
    assert (factors.of(Tier.PRIORITY), factors.of(Tier.FLEX)) == (2, Decimal("0.8"))
    assert factors.of(Tier.DEFAULT) == 1


@pytest.mark.parametrize("price", [-1, "NaN", "Infinity", "0.0000000000001", "x"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_prices_are_refused_by_name(name, price):
    with pytest.raises(SettingsError, match=rf"rate_card\.{name}"):
        RateCard.load({"input": 1, "output": 1, name: price}, "rate_card")


@pytest.mark.parametrize(
    "counts",
    [(1, 2, 0), (-1, 0, 0), (1, 0, -1), (2, 1, 0, 2), (2, 0, 0, -1), (1, 0, 0, 0, -1),
     (1, 0, 0, 0, 0, -1)],
)  # fmt: skip
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="impossible"):
        TokenUsage(*counts)
