from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.traffic import Outcome, Served, Traffic
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.history.window import Window

pytestmark = pytest.mark.unit

SPAN_S = 300.0


def serve(traffic, times=1):
    for _ in range(times):
        done = Served(True, 0, 0.1, 2.1, TokenUsage(5, 0, 101), Decimal(0), False)
        traffic.add(Outcome(Tier.FLEX, Tier.FLEX, "completed", None), done)


@given(
    st.lists(st.tuples(st.floats(0, 400), st.integers(0, 3)), max_size=40),
    st.sampled_from([0.0, 5.0, 20.0]),
)
def test_each_request_counts_for_as_long_as_it_is_said(steps, step_s):
    traffic, window = Traffic(), Window(SPAN_S, step_s)
    now, ended = 0.0, []
    for pause, times in steps:
        now += pause
        serve(traffic, times)
        ended += [now] * times
        counted, over_s = window.add(now, Traffic.of([traffic]))
        began = now - over_s
        after = sum(at > began + 0.001 for at in ended)
        until = sum(at >= began - 0.001 for at in ended)
        assert after <= counted.requests <= until
        assert over_s <= SPAN_S + step_s + max(pause for pause, _ in steps)


def test_little_is_remembered_however_often_it_is_looked_at():
    window = Window(SPAN_S, 5.0)
    for tenth in range(10_000):
        window.add(tenth / 10, Traffic())
    assert len(window) <= SPAN_S / 5 + 2
