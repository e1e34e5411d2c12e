"""Metrics, board and usage page mean the same by a downgrade."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.traffic import Traffic
from app.core.pricing import FREE, TokenUsage
from app.core.tier_decision import (
    ANSWER_CUT_OFF,
    DOWNGRADE_REASONS,
    RAISED,
    TierDecision,
    TierRights,
    admit,
    decide,
    downgrade_reason,
)
from app.core.tiers import ACCEPTED_VALUES, PriorityMode, Tier, TierOffer, TierReason
from app.core.tiers import parse_requested as parse
from app.gateway.telemetry import traffic_samples
from app.history.point import downgrades_of
from app.ledger.record import State, UsageRecord
from app.observe.catalogue import DOWNGRADES
from app.observe.observers import Ended
from app.observe.tallies import Tallies
from app.web.usage_view import record_line
from tests.support import records

pytestmark = pytest.mark.unit

USAGE = TokenUsage(10, 0, 5)
TIERS = [None, *Tier]
CUTS = ["client_gone", "engine_lost", "engine_error", "ingress_lost"]
NOT_SERVED = [State.SHED, State.REFUSED, State.ABANDONED]


def seen(record):
    """Return the downgrades that metrics and board count, and whether the usage page shows one."""
    tallies = Tallies()
    tallies.ended(Ended(record, 200))
    traffic = Traffic.of([tallies.of("m")])
    counted = {
        sample.labels[2]: sample.value
        for sample in traffic_samples("m", traffic, {})
        if sample.metric is DOWNGRADES and sample.value
    }
    return counted, dict(downgrades_of(traffic)), record_line(record)["differs"]


def settled(decision, cut=None):
    origin = records.origin(requested=decision.requested)
    opened = UsageRecord.open(origin, decision, engine="vllm", replica="r", queue_s=0.1)
    state = State.COMPLETED if cut is None else State.INTERRUPTED
    return opened.settle(state, USAGE, ended=records.NOON + timedelta(seconds=1), reason=cut)


@given(
    st.sampled_from(TIERS),
    st.sampled_from(Tier),
    st.sampled_from([None, *TierReason]),
    st.sampled_from([None, *CUTS]),
)
def test_all_agree_on_every_served_request(requested, served, reason, cut):
    if reason is None and requested not in (None, served):
        reason = TierReason.NO_REPLICA_HONOURS_PRIORITY
    record = settled(TierDecision(requested, served, reason, FREE), cut)
    why = downgrade_reason(requested, served, record.reason)
    assert why is None or why in DOWNGRADE_REASONS
    once = {} if why is None else {why: 1}
    assert seen(record) == (once, once, why is not None)


@given(
    st.sampled_from(TIERS),
    st.sampled_from(NOT_SERVED),
    st.sampled_from([*TierReason, "queue_full", "client_gone"]),
)
def test_all_agree_that_a_request_without_an_engine_is_none(requested, state, reason):
    record = UsageRecord.not_served(
        records.origin(requested=requested), state, str(reason), queue_s=0.0, ended=records.NOON
    )
    assert seen(record) == ({}, {}, False)


@given(
    st.sampled_from([None, *ACCEPTED_VALUES]),
    st.sampled_from(Tier),
    st.builds(TierOffer, st.sampled_from(PriorityMode), st.booleans()),
    st.builds(TierRights, st.just(frozenset(Tier)), st.booleans()),
    st.booleans(),
    st.sampled_from([None, *CUTS]),
)
def test_it_is_the_reason_that_the_answer_names(word, default, offer, rights, honoured, cut):
    wanted = parse(word)
    admitted = admit(wanted.tier, default, offer, rights, wanted.reason)
    decision = decide(
        admitted,
        queued_as=admitted.tier,
        offer=offer,
        native_priority=honoured,
        route_honoured=honoured,
        rate_card=FREE,
    )
    counted, _, _ = seen(settled(decision, cut))
    named = decision.reason and decision.reason.value
    if cut is None:
        assert set(counted) == ({named} if named else set())
    else:
        assert set(counted) <= ({ANSWER_CUT_OFF} if named else set())


@given(
    st.sampled_from([None, Tier.FLEX, Tier.DEFAULT]),
    st.sampled_from([Tier.DEFAULT, Tier.PRIORITY]),
    st.sampled_from([None, *TierReason]),
    st.sampled_from([None, *CUTS]),
)
def test_a_raised_request_is_none_unless_it_could_not_have_priority(requested, served, reason, cut):
    record = settled(TierDecision(requested, served, reason, FREE, raised=True), cut)
    assert record.reason is not None and record.reason.split(", ")[0] == RAISED
    once = {} if cut or reason is None else {reason.value: 1}
    assert seen(record) == (once, once, bool(once))
