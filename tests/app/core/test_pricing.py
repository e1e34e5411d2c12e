from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import Multipliers, RateCard, TokenUsage, cost
from app.core.settings import SettingsError
from app.core.tiers import Tier

pytestmark = pytest.mark.unit

tokens = st.integers(0, 10_000_000)
usages = st.builds(
    lambda prompt, cached, completion: TokenUsage(prompt, min(cached, prompt), completion),
    tokens,
    tokens,
    tokens,
)
prices = st.decimals(0, 1000, places=6)
cards = st.builds(
    lambda i, c, o: RateCard(input=i, cached_input=c, output=o), prices, prices, prices
)


@given(usages, cards)
def test_priority_costs_exactly_one_and_a_half_times_default(usage, card):
    assert cost(usage, card, Tier.PRIORITY) == Decimal("1.5") * cost(usage, card, Tier.DEFAULT)
    assert cost(usage, card, Tier.FLEX) == Decimal("0.8") * cost(usage, card, Tier.DEFAULT)


@given(usages, usages, cards, st.sampled_from(Tier))
def test_costs_add_up(one, other, card, tier):
    both = TokenUsage(
        one.prompt_tokens + other.prompt_tokens,
        one.cached_tokens + other.cached_tokens,
        one.completion_tokens + other.completion_tokens,
    )
    assert cost(both, card, tier) == cost(one, card, tier) + cost(other, card, tier)


def test_a_worked_example():
    card = RateCard(input="0.02", cached_input="0.01", output="0.04")
    usage = TokenUsage(prompt_tokens=1000, cached_tokens=400, completion_tokens=250)
    # 600 x 0.02 + 400 x 0.01 + 250 x 0.04 = 26 millionths of a dollar
    assert cost(usage, card, Tier.DEFAULT) == Decimal("0.000026")
    assert cost(usage, card, Tier.PRIORITY) == Decimal("0.000039")
    assert cost(usage, card, Tier.FLEX) == Decimal("0.0000208")


def test_prices_written_as_numbers_in_yaml_are_exact():
    card = RateCard.load({"input": 0.1, "output": 0.3}, "rate_card")
    assert (card.input, card.output) == (Decimal("0.1"), Decimal("0.3"))


def test_cached_input_costs_as_input_if_not_set():
    assert RateCard(input="0.5").cached_input == Decimal("0.5")
    assert RateCard(input="0.5", cached_input="0").cached_input == 0


def test_equal_cards_have_equal_versions_and_others_do_not():
    card = RateCard(input="0.50", output="1")
    assert card.version == RateCard(input="0.5", output="1.00").version
    assert card.version != RateCard(input="0.51", output="1").version
    assert card.version != RateCard(input="0.5", output="1", multipliers={"flex": "0.7"}).version


def test_one_multiplier_may_be_set_alone():
    factors = Multipliers(priority="2")
    assert (factors.of(Tier.PRIORITY), factors.of(Tier.FLEX)) == (2, Decimal("0.8"))
    assert factors.of(Tier.DEFAULT) == 1


@pytest.mark.parametrize("price", [-1, "NaN", "Infinity", "0.0000000000001", "x"])
def test_bad_prices_are_refused_by_name(price):
    with pytest.raises(SettingsError, match=r"rate_card\.input"):
        RateCard.load({"input": price}, "rate_card")


@pytest.mark.parametrize(("prompt", "cached", "completion"), [(1, 2, 0), (-1, 0, 0), (1, 0, -1)])
def test_impossible_counts_are_refused(prompt, cached, completion):
    with pytest.raises(ValueError, match="impossible"):
        TokenUsage(prompt, cached, completion)
