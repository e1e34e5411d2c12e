from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import ModelSettings
from app.core.pricing import FREE, TokenUsage
from app.core.settings import SettingsError
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.ledger.record import State, UsageRecord
from app.observe.slo import judge
from tests.support import records

pytestmark = pytest.mark.unit

TARGET_S = 0.4


def ended(state, *, ttft_s=None, after_s=1.0, reason=None, stream=True):
    record = records.opened(stream=stream)
    at = record.origin.arrived + timedelta(seconds=after_s)
    return record.settle(state, TokenUsage(1, 0, 1), ended=at, ttft_s=ttft_s, reason=reason)


def refused(state, reason):
    return UsageRecord.not_served(records.origin(), state, reason, queue_s=0.0, ended=records.NOON)


@given(st.floats(0, 10), st.sampled_from([State.COMPLETED, State.INTERRUPTED, State.FAILED]))
def test_a_first_byte_counts_by_its_time_however_the_stream_ended(ttft_s, state):
    assert judge(ended(state, ttft_s=ttft_s, after_s=20), TARGET_S) is (ttft_s <= TARGET_S)


@pytest.mark.parametrize(
    ("record", "met"),
    [
        (refused(State.SHED, "queue_full"), False),
        (refused(State.REFUSED, "engine_not_ready"), False),
        (refused(State.REFUSED, "rate_limit_exceeded"), None),
        (refused(State.REFUSED, "concurrency_limit_exceeded"), None),
        (refused(State.REFUSED, "insufficient_quota"), None),
        (ended(State.FAILED, reason="engine_error"), False),
        (ended(State.FAILED, reason="engine_rejected"), None),
        (ended(State.INTERRUPTED, reason="client_gone", after_s=0.5), False),
        (ended(State.INTERRUPTED, reason="client_gone", after_s=0.3), None),
        (ended(State.COMPLETED, ttft_s=9.0, after_s=9.0, stream=False), None),
    ],
)
def test_a_stream_without_a_first_byte_is_missed_unless_its_client_was_the_reason(record, met):
    assert judge(record, TARGET_S) is met


@pytest.mark.parametrize(
    ("state", "reason"), [(State.COMPLETED, None), (State.INTERRUPTED, "client_gone")]
)
def test_a_raised_request_has_waited_at_another_tier_and_does_not_count(state, reason):
    decision = TierDecision(Tier.FLEX, Tier.DEFAULT, None, FREE, raised=True)
    origin = records.origin(requested=Tier.FLEX, stream=True)
    opened = UsageRecord.open(origin, decision, engine="vllm", replica="r", queue_s=9.0)
    at = origin.arrived + timedelta(seconds=10)
    record = opened.settle(state, TokenUsage(1, 0, 1), ended=at, ttft_s=9.0, reason=reason)
    assert judge(record, TARGET_S) is None


@pytest.mark.parametrize("slo", [{"ttft_ms": 0}, {"ttft_ms": 5, "p": 1}, {"p": 0.5}, {"x": 1}])
def test_a_bad_objective_is_refused_by_its_key(slo):
    with pytest.raises(SettingsError, match=r"slo\.priority"):
        ModelSettings.load({"slo": {"priority": slo}}, "user_config")


def test_a_tier_without_an_objective_has_none():
    slo = ModelSettings.load({"slo": {"flex": {"ttft_ms": 5}}}, "user_config").slo
    assert [tier for tier in Tier if slo.of(tier) is not None] == [Tier.FLEX]
