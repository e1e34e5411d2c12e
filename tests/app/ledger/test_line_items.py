from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import Prices, TokenUsage
from app.ledger.line_items import line_items
from app.ledger.usage import Grouping, Priced
from tests.support.records import prices, usages

pytestmark = pytest.mark.unit

PRICES = st.builds(
    Prices, prices, prices, prices, st.decimals(0, 10, places=4), prices, prices, prices,
    long_from=st.just(0), long=st.none(),
)  # fmt: skip
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
UNITS = {
    **dict.fromkeys(("input_tokens", "cached_input_tokens", "output_tokens"), "tokens"),
    "cache_write_input_tokens": "tokens",
    "images": "images",
    "audio_seconds": "duration_seconds",
}
UNSERVED = Priced(
    {"day": "2026-11-30", "tenant": "a", "model": "m"}, 3, None, TokenUsage(0, 0, 0)
)  # fmt: skip


@given(st.lists(PRICED, max_size=8))
def test_items_add_up_to_the_whole_to_the_last_digit(priced):
    groupings = [Grouping.DAY, Grouping.TENANT]
    items = line_items([*priced, UNSERVED], groupings)
    keys = [(item.group["day"], item.group["tenant"], item.name) for item in items]
    assert keys == sorted(set(keys))
    assert all(item.quantity for item in items)
    kinds = {item.name.rpartition(", ")[2]: item.unit for item in items}
    assert kinds.items() <= UNITS.items()
    for day, tenant in {key[:2] for key in keys}:
        group = {"day": day, "tenant": tenant}
        whole = [one for one in priced if one.group | group == one.group]
        parts = [item for item in items if item.group == group]
        assert sum(Fraction(item.cost) for item in parts) == sum(
            Fraction(one.total().cost) for one in whole
        )
        used = [one.usage for one in whole]
        expected = {
            "tokens": sum(usage.prompt_tokens + usage.completion_tokens for usage in used),
            "images": sum(usage.images for usage in used),
            "duration_seconds": sum(usage.audio_seconds for usage in used),
        }
        for unit, quantity in expected.items():
            assert sum(item.quantity for item in parts if item.unit == unit) == quantity
