from datetime import date, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.tenants.budget import MAX_USD, Budget, Owner, Period, parse_budget

pytestmark = pytest.mark.unit

days = st.dates(date(1999, 1, 1), date(2100, 1, 1))
amounts = st.decimals(0, MAX_USD, places=12)
budgets = st.builds(
    Budget, st.just(Owner.KEY), st.just("k"), st.sampled_from(Period), amounts, st.booleans()
)


@given(days, st.sampled_from([Period.DAY, Period.MONTH]))
def test_periods_follow_each_other_without_a_gap(day, period):
    start, end = period.start(day), period.end(day)
    assert start <= day < end
    for each in (start, end - timedelta(days=1)):
        assert (period.start(each), period.end(each)) == (start, end)
    assert period.start(end) == end
    assert period is Period.DAY or (start.day, end.day) == (1, 1)


def test_the_total_has_no_end():
    assert Period.TOTAL.start(date(2026, 11, 30)) is Period.TOTAL.end(date(2026, 11, 30)) is None


@given(budgets)
def test_a_budget_is_read_as_it_is_shown(budget):
    assert parse_budget(str(budget), Owner.KEY, "k") == budget


@pytest.mark.parametrize(
    ("text", "period", "usd", "hard"),
    [
        ("month=100", Period.MONTH, "100", True),
        ("day=5:warn", Period.DAY, "5", False),
        ("total=0.5:hard", Period.TOTAL, "0.5", True),
        (" day=0 ", Period.DAY, "0", True),
    ],
)
def test_the_mode_is_hard_unless_it_says_warn(text, period, usd, hard):
    assert parse_budget(text, Owner.TENANT, "acme") == Budget(
        Owner.TENANT, "acme", period, Decimal(usd), hard
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "10", "week=1", "day", "day=", "day=many", "day=-1", "day=NaN", "day=Infinity",
        "day=1:soft", "day=1e13", "day=0.0000000000001", "day=1,5", "=1",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_what_is_expected(text):
    with pytest.raises(ValueError, match=r"expected day\|month\|total=USD"):
        parse_budget(text, Owner.KEY, "k")
