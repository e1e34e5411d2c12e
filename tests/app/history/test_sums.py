from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.traffic import Outcome, Served, Traffic
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.history.sums import MOST_INGRESSES, SETTLING_S, TrafficSums

pytestmark = pytest.mark.unit

TIERS = st.sampled_from(Tier)


def add(traffic, tier, count=1):
    for _ in range(count):
        done = Served(True, 0.1, 0.2, 1.0, TokenUsage(3, 1, 2), Decimal("0.1"), False)
        traffic.add(Outcome(tier, tier, "completed", None), done)
    return traffic


def counts(traffic):
    return {tier: (one.duration.count, one.cost) for tier, one in traffic.tiers.items()}


# Each step: which ingress, what it serves, and whether its report arrives.
STEPS = st.lists(st.tuples(st.integers(0, 5), TIERS, st.integers(0, 3), st.booleans()))


@given(STEPS)
def test_the_sum_over_ingresses_that_come_and_go_never_falls(steps):
    sums, living, before = TrafficSums(0.0), {}, {}
    for number, (ingress, tier, served, arrives) in enumerate(steps):
        if not served:
            # It is replaced by another one.
            living.pop(ingress, None)
            continue
        name, traffic = living.setdefault(ingress, (f"{ingress}-{number}", Traffic()))
        add(traffic, tier, served)
        if arrives:
            sums.take(name, Traffic.of([traffic]), SETTLING_S + number)
        after = counts(sums.total())
        for one, (requests, cost) in before.items():
            assert after[one][0] >= requests and after[one][1] >= cost
        before = after


@given(STEPS)
def test_the_sum_is_that_of_the_latest_reports(steps):
    sums, latest = TrafficSums(0.0), {}
    for ingress, tier, served, _ in steps:
        latest[ingress] = add(Traffic.of([latest.get(ingress, Traffic())]), tier, served)
        sums.take(str(ingress), latest[ingress], 0.0)
        sums.take(str(ingress), latest[ingress], 0.0)
    assert counts(sums.total()) == counts(Traffic.of(latest.values()))


def test_more_ingresses_than_are_kept_apart_lose_nothing():
    sums = TrafficSums(0.0)
    for number in range(2 * MOST_INGRESSES):
        sums.take(str(number), add(Traffic(), Tier.FLEX), 100.0)
    assert sums.total().requests == 2 * MOST_INGRESSES
    assert len(sums) == MOST_INGRESSES


def test_what_was_served_before_the_model_started_has_not_been_served_since():
    sums = TrafficSums(0.0)
    old, new = add(Traffic(), Tier.FLEX, 50), Traffic()
    sums.take("old", old, 1.0)
    assert sums.grown(sums.total()).requests == 0
    sums.take("old", add(Traffic.of([old]), Tier.FLEX, 2), 2.0)
    sums.take("new", add(new, Tier.DEFAULT, 3), SETTLING_S + 1)
    total = sums.total()
    assert (total.requests, sums.grown(total).requests) == (55, 5)
    assert sums.grown(total).tiers[Tier.FLEX].cost == Decimal("0.2")
