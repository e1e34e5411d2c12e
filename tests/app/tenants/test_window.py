"""The amount used in the last minute, against amounts counted one by one."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.tenants.window import MINUTE_S, Window

pytestmark = pytest.mark.unit


@given(st.lists(st.tuples(st.integers(-20, 50), st.floats(0, 20)), max_size=50))
def test_a_window_never_counts_too_little(amounts):
    """Against a list of all amounts, where what is taken back is taken from the oldest left."""
    window, kept, now = Window(), [], 1000.0
    for amount, pause in amounts:
        now += pause
        kept = [[at, left] for at, left in kept if at > now - MINUTE_S]
        assert sum(left for _, left in kept) <= window.used(now)
        window.add(amount, now)
        if amount >= 0:
            kept.append([now, amount])
        else:
            for entry in kept:
                back = min(entry[1], -amount)
                entry[1], amount = entry[1] - back, amount + back


windows = st.lists(
    st.tuples(st.sampled_from(["add", "overdraw", "back"]), st.integers(0, 40), st.floats(0, 20)),
    max_size=40,
)


@given(windows, st.integers(1, 50))
def test_a_window_with_debts_says_when_they_are_paid(events, limit):
    window, now = Window(), 1000.0
    for what, amount, pause in events:
        now += pause
        before = window.used(now)
        if what == "add":
            # As those who ask are given no more than there is.
            amount = max(0, min(amount, limit - before))
            window.add(amount, now)
        elif what == "overdraw":
            window.overdraw(amount, now, limit)
        else:
            amount = -min(amount, before)
            window.take_back(-amount)
        assert window.used(now) == before + amount
    owed = window.used(now)
    for amount in {1, owed // 2, owed} - {0} if owed else ():
        at = window.frees_at(amount, now)
        later = copy.deepcopy(window)
        assert later.used(at - 0.01) > owed - amount
        assert later.used(at) <= owed - amount
    assert window.used(now + (owed + 2) * (MINUTE_S + 1)) == 0
