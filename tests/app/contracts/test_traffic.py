import pickle
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.traffic import TTFT_BOUNDS_S, Attainment, Histogram, Outcome, Served, Traffic
from app.core.pricing import TokenUsage
from app.core.tiers import Tier

pytestmark = pytest.mark.unit

VALUES = st.lists(st.floats(0, 300), max_size=50)


def histogram(values):
    one = Histogram(TTFT_BOUNDS_S)
    for value in values:
        one.add(value)
    return one


@given(VALUES)
def test_a_bucket_holds_the_values_up_to_its_bound(values):
    one = histogram(values)
    for number, bound in enumerate(one.bounds):
        assert sum(one.counts[: number + 1]) == sum(value <= bound for value in values)
    assert one.count == len(values)


@given(VALUES, VALUES)
def test_joined_counts_are_those_of_all_values(some, others):
    joined = histogram(some)
    joined.join(histogram(others))
    assert joined.counts == histogram(some + others).counts
    assert joined.since(histogram(some)).counts == histogram(others).counts


@given(VALUES, st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_exact_one(values, share):
    value = histogram(values).quantile(share)
    if not values:
        assert value is None
        return
    exact = sorted(values)[max(-int(-share * len(values) // 1), 1) - 1]
    above = [bound for bound in TTFT_BOUNDS_S if bound >= exact]
    below = [bound for bound in TTFT_BOUNDS_S if bound < exact]
    assert value <= (above[0] if above else TTFT_BOUNDS_S[-1])
    assert value >= (below[-1] if below else 0.0) or not above


def served(cost="0.1"):
    return Served(True, 0.0, 0.1, 1.0, TokenUsage(1, 0, 2), Decimal(cost), False)


def test_the_sum_of_ingresses_changes_none_of_them():
    done = Outcome(None, Tier.FLEX, "completed", None)
    one, other = Traffic(), Traffic()
    one.add(done, served())
    other.add(done, served("0.2"))
    other.add(Outcome(None, None, "shed", "queue_full"), None)
    one.attain(Tier.FLEX, met=True)
    other.attain(Tier.FLEX, met=False)
    other.attain(Tier.PRIORITY, met=True)
    whole = Traffic.of([one, other])
    assert whole.outcomes[done] == 2
    assert whole.tier(Tier.FLEX).cost == Decimal("0.3")
    assert whole.tier(Tier.FLEX).completion_tokens == 4
    assert whole.slo == {Tier.FLEX: Attainment(1, 1), Tier.PRIORITY: Attainment(1, 0)}
    assert (one.outcomes[done], one.slo) == (1, {Tier.FLEX: Attainment(1, 0)})
    assert one.tier(Tier.FLEX).ttft.count == 1


def test_it_survives_a_pickle():
    traffic = Traffic()
    traffic.add(Outcome(None, Tier.FLEX, "completed", None), served())
    copy = pickle.loads(pickle.dumps(traffic))
    assert copy.outcomes == traffic.outcomes
    assert copy.tier(Tier.FLEX).ttft.counts == traffic.tier(Tier.FLEX).ttft.counts
