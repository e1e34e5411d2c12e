import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.holdings import Holding, Holdings

pytestmark = pytest.mark.unit

HOLDERS = [(("key", "a1"), ("tenant", "a")), (("key", "a2"), ("tenant", "a")),
           (("key", "b1"), ("tenant", "b")), (("key", "a"), ("tenant", "key"))]  # fmt: skip
steps = st.lists(
    st.tuples(st.integers(0, 7), st.none() | st.integers(0, 9), st.integers(0, 12)), max_size=60
)


@given(steps)
def test_nobody_gets_more_than_its_bound_and_everything_comes_back(steps):
    holdings = Holdings()
    many = [Holding(holdings, *holders) for holders in HOLDERS * 2]
    had = [0] * len(many)

    def of(holder):
        return sum(n for n, held in zip(had, HOLDERS * 2, strict=True) if holder in held)

    for number, amount, bound in steps:
        one, bounds = many[number], {"key": bound, "tenant": bound + 3}
        if amount is None:
            one.give_back()
            one.give_back()
            had[number] = 0
        else:
            full = one.grow(amount, *bounds.values())
            over = [h for h in (HOLDERS * 2)[number] if of(h) + amount > bounds[h[0]]]
            assert full == (over[0][0] if over else None)
            had[number] += 0 if over else amount
        assert [one.amount for one in many] == had
        for held in HOLDERS:
            assert all(holdings.of(*holder) == of(holder) for holder in held)
        holders = {holder for held in HOLDERS for holder in held}
        assert len(holdings) == sum(of(holder) > 0 for holder in holders)
    for one in many:
        with one:
            pass
    assert len(holdings) == 0, "nobody is remembered who has nothing"


def test_as_many_bounds_as_holders():
    with pytest.raises(ValueError, match="zip"):
        Holding(Holdings(), ("key", "a"), ("tenant", "b")).grow(1, 5)
