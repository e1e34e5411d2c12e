from datetime import UTC, datetime, timedelta

import pytest

from app.contracts.traffic import Outcome
from app.core.pricing import RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier, TierReason
from app.ledger.record import Origin, State, UsageRecord
from app.observe.observers import Ended, Refused
from app.observe.tallies import Tallies

pytestmark = pytest.mark.unit

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
CARD = RateCard.load({"input": 1, "output": 2}, "rate_card")
REASON = TierReason.NO_REPLICA_HONOURS_PRIORITY


def origin(stream=True):
    return Origin("req_1", "", "", "m", "chat/completions", stream, Tier.PRIORITY, NOON)


def completed(*, stream=True):
    decision = TierDecision(Tier.PRIORITY, Tier.DEFAULT, REASON, CARD)
    record = UsageRecord.open(origin(stream), decision, engine="vllm", replica="r", queue_s=0.25)
    ended = NOON + timedelta(seconds=2.5)
    return record.settle(State.COMPLETED, TokenUsage(10, 4, 5), ended=ended, ttft_s=0.5)


def test_a_served_request_is_counted_at_the_tier_it_was_served():
    tallies = Tallies()
    record = completed()
    tallies.ended(Ended(record, 200))
    traffic = tallies.of("m")
    assert traffic.outcomes == {Outcome(Tier.PRIORITY, Tier.DEFAULT, "completed", REASON.value): 1}
    [(tier, counts)] = traffic.tiers.items()
    assert tier is Tier.DEFAULT
    assert (counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens) == (10, 4, 5)
    assert counts.cost == record.cost
    assert [one.count for one in counts.histograms()] == [1, 1, 1, 1]
    assert (counts.ttft.total, counts.per_token.total) == (0.5, 0.5)
    assert (counts.duration.total, counts.queue.total) == (2.5, 0.25)


def test_a_whole_answer_has_no_time_to_a_first_token():
    tallies = Tallies()
    tallies.ended(Ended(completed(stream=False), 200))
    counts = tallies.of("m").tier(Tier.DEFAULT)
    assert (counts.ttft.count, counts.per_token.count, counts.duration.count) == (0, 0, 1)


def test_a_shed_request_has_an_outcome_and_no_tier():
    tallies = Tallies()
    record = UsageRecord.not_served(origin(), State.SHED, "queue_full", queue_s=1.0, ended=NOON)
    tallies.ended(Ended(record, 429))
    assert tallies.of("m").outcomes == {Outcome(Tier.PRIORITY, None, "shed", "queue_full"): 1}
    assert not tallies.of("m").tiers


def test_requests_without_a_model_are_counted_by_status_and_reason():
    tallies = Tallies()
    for _ in range(2):
        tallies.refused(Refused("req_1", "embeddings", "", 401, "invalid_api_key"))
    assert tallies.refused_requests == {("embeddings", 401, "invalid_api_key"): 2}
