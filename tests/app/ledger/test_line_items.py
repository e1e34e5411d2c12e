from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import Prices, TokenUsage
from app.ledger.line_items import line_items
from app.ledger.usage import Grouping, Priced
from tests.support.records import prices, usages

pytestmark = pytest.mark.unit

PRICES = st.builds(Prices, prices, prices, prices, st.decimals(0, 10, places=4))
PRICED = st.builds(
    lambda day, tenant, model, *rest: Priced(
        {"day": day, "tenant": tenant, "model": model}, *rest
    ),
    st.sampled_from(["2026-11-29", "2026-11-30"]),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["m", "n, output_tokens"]),
    st.integers(1, 100),
    PRICES,
    usages,
)  # fmt: skip
UNSERVED = Priced(
    {"day": "2026-11-30", "tenant": "a", "model": "m"}, 3, None, TokenUsage(0, 0, 0)
)  # fmt: skip


@given(st.lists(PRICED, max_size=8))
def test_items_add_up_to_the_whole_to_the_last_digit(priced):
    groupings = [Grouping.DAY, Grouping.TENANT]
    items = line_items([*priced, UNSERVED], groupings)
    keys = [(item.group["day"], item.group["tenant"], item.name) for item in items]
    assert keys == sorted(set(keys))
    assert all(item.tokens for item in items)
    for day, tenant in {key[:2] for key in keys}:
        group = {"day": day, "tenant": tenant}
        whole = [one for one in priced if one.group | group == one.group]
        parts = [item for item in items if item.group == group]
        assert sum(Fraction(item.cost) for item in parts) == sum(
            Fraction(one.total().cost) for one in whole
        )
        assert sum(item.tokens for item in parts) == sum(
            one.usage.prompt_tokens + one.usage.completion_tokens for one in whole
        )
