"""The formulas against what they must come down to, and against a simulation."""

import heapq
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.scaling.queueing import crowd, erlang_b

pytestmark = pytest.mark.unit

loads = st.floats(0.0, 5_000.0)
servers = st.integers(1, 3_000)


def erlang_b_by_recursion(n, load):
    blocked = 1.0
    for server in range(1, n + 1):
        blocked = load * blocked / (server + load * blocked)
    return blocked


@given(servers, loads)
def test_erlang_b_is_what_its_recursion_says(n, load):
    assert erlang_b(n, load) == pytest.approx(erlang_b_by_recursion(n, load), rel=1e-9, abs=1e-12)


@given(st.integers(1, 500), st.floats(0.001, 0.999))
def test_without_headroom_everybody_meets_erlang_c(n, utilization):
    load = n * utilization
    blocked = erlang_b_by_recursion(n, load)
    waits = blocked / (1 - utilization * (1 - blocked))
    met = crowd(n, 0, load / 3, load * 2 / 3)
    assert met.priority_waits == pytest.approx(waits, rel=1e-6, abs=1e-9)
    assert met.others_wait == pytest.approx(waits, rel=1e-6, abs=1e-9)
    assert met.spare == pytest.approx(n - load)


@given(st.integers(2, 500), st.floats(0, 0.5), loads, loads)
def test_priority_waits_no_more_often_than_others(n, share, priority, others):
    met = crowd(n, int(share * n), priority, others)
    assert 0 <= met.priority_waits <= met.others_wait <= 1


@given(
    st.integers(2, 300), st.floats(0, 0.5), st.floats(0, 300), st.floats(0, 300), st.floats(1, 2)
)
def test_more_load_means_more_waiting(n, share, priority, others, factor):
    headroom = int(share * n)
    less, slack = crowd(n, headroom, priority, others), 1e-9
    for more in (crowd(n, headroom, priority * factor, others),
                 crowd(n, headroom, priority, others * factor)):  # fmt: skip
        assert more.priority_waits >= less.priority_waits - slack
        assert more.others_wait >= less.others_wait - slack


@pytest.mark.parametrize(
    ("slots", "headroom", "priority", "others"), [(8, 1, 1.0, 4.5), (16, 4, 6.0, 5.0)]
)
def test_it_is_what_a_simulation_finds(slots, headroom, priority, others):
    met = crowd(slots, headroom, priority, others)
    waits = simulate(slots, headroom, priority, others, arrivals=60_000)
    assert waits == pytest.approx([met.priority_waits, met.others_wait], rel=0.15)


def simulate(slots, headroom, priority, others, arrivals):
    """Which parts of priority and other requests find no slot that they may use."""
    random, now, busy, ends = Random(1), 0.0, 0, []
    lines, came, waited = [0, 0], [0, 0], [0, 0]

    def place(now):
        nonlocal busy
        for tier, most in enumerate((slots, slots - headroom)):
            while lines[tier] and busy < most:
                lines[tier] -= 1
                busy += 1
                heapq.heappush(ends, now + random.expovariate(1.0))

    for _ in range(arrivals):
        now += random.expovariate(priority + others)
        while ends and ends[0] <= now:
            busy -= 1
            place(heapq.heappop(ends))
        tier = int(random.random() * (priority + others) >= priority)
        came[tier] += 1
        waited[tier] += busy >= (slots, slots - headroom)[tier]
        lines[tier] += 1
        place(now)
    return [part / whole for part, whole in zip(waited, came, strict=True)]


def test_a_large_fleet_takes_a_moment():
    assert crowd(32_000, 3_200, 3_000.0, 25_500.0).others_wait < 0.05
    assert math.isfinite(crowd(32_000, 0, 31_999.0, 0.0).priority_waits)
