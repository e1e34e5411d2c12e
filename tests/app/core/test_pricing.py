import pickle
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import FREE, Multipliers, RateCard, TokenUsage, cost
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


@given(usages, cards, st.sampled_from(Tier))
def test_a_cost_has_the_digits_of_the_sum_at_the_prices_times_the_factor(usage, card, tier):
    """The ledger writes every digit, trailing zeros included."""
    fresh = usage.prompt_tokens - usage.cached_tokens
    sums = fresh * card.input + usage.cached_tokens * card.cached_input
    whole = (sums + usage.completion_tokens * card.output) * card.multipliers.of(tier)
    if usage.prompt_tokens or usage.completion_tokens:
        assert str(cost(usage, card, tier)) == str(whole.scaleb(-6))


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
    assert RateCard(input="0.5", output="1").cached_input == Decimal("0.5")
    assert RateCard(input="0.5", cached_input="0", output="1").cached_input == 0


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
def test_bad_prices_are_refused_by_name(price):
    with pytest.raises(SettingsError, match=r"rate_card\.input"):
        RateCard.load({"input": price, "output": 1}, "rate_card")


@pytest.mark.parametrize(("prompt", "cached", "completion"), [(1, 2, 0), (-1, 0, 0), (1, 0, -1)])
def test_impossible_counts_are_refused(prompt, cached, completion):
    with pytest.raises(ValueError, match="impossible"):
        TokenUsage(prompt, cached, completion)
