from decimal import Decimal

import orjson
import pytest

from app.contracts.speeds import Speeds
from app.contracts.traffic import Outcome, Served, Traffic
from app.core.pricing import TokenUsage
from app.core.tiers import Tier

pytestmark = pytest.mark.unit


def served(tier, ttft_s, times):
    traffic = Traffic()
    for _ in range(times):
        done = Served(True, 0, ttft_s, ttft_s + 2, TokenUsage(5, 0, 101), Decimal(0), False)
        traffic.add(Outcome(tier, tier, "completed", None), done)
    return traffic


def test_speeds_are_of_each_tier():
    recent = Traffic.of([served(Tier.PRIORITY, 0.05, 10), served(Tier.DEFAULT, 3.0, 4)])
    speeds = Speeds.of(recent, 10)
    assert speeds.over_s == 10
    priority, default, flex = (speeds.tiers[tier] for tier in Tier)
    assert (priority.requests, default.requests, flex.requests) == (10, 4, 0)
    assert priority.ttft_p50_s == pytest.approx(0.05, abs=0.01)
    assert priority.ttft_p99_s == pytest.approx(0.06, abs=0.01)
    assert default.ttft_p50_s == pytest.approx(3.75, abs=1.25)
    assert priority.tokens_per_s == pytest.approx(57, abs=10)
    assert (flex.ttft_p50_s, flex.ttft_p99_s, flex.tokens_per_s) == (None, None, None)


def test_they_survive_json():
    for speeds in (Speeds(), Speeds.of(served(Tier.FLEX, 0.3, 2), 60.0)):
        assert Speeds.from_fields(orjson.loads(orjson.dumps(speeds.to_fields()))) == speeds
