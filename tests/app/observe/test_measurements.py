from datetime import timedelta

import pytest

from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.ledger.record import State
from app.observe.catalogue import DURATION, PER_TOKEN, TTFT
from app.observe.measurements import Measurements
from app.observe.observers import Ended
from tests.support import records

pytestmark = pytest.mark.unit


def measured(*ended, models=()):
    measurements = Measurements()
    for record in ended:
        measurements.ended(Ended(record, 200))
    return {(s.metric.name, s.labels): s.value for s in measurements.samples(models)}


def labels(requested, served, error="", operation="chat"):
    return (operation, "openai", "m", requested, served, error)


def test_a_downgraded_request_has_both_tiers():
    found = measured(records.completed(served=Tier.DEFAULT))
    one = labels("priority", "default")
    assert found[DURATION.name, one].total == 2.0
    assert found[TTFT.name, one].total == 0.5
    assert found[PER_TOKEN.name, one].total == 1.5 / 249


def test_a_request_that_was_shed_has_an_error_and_no_served_tier():
    found = measured(records.shed())
    assert list(found) == [(DURATION.name, labels("priority", "", "queue_full"))]


@pytest.mark.parametrize(
    ("route", "operation"),
    # a94f7f2: "responses" here, and "chat" on spans.
    [("completions", "text_completion"), ("embeddings", "embeddings"), ("responses", "chat")],
)
def test_the_operation_is_opentelemetrys(route, operation):
    found = measured(records.completed(route=route, requested=None))
    assert (DURATION.name, labels("auto", "priority", operation=operation)) in found


def test_an_answer_that_broke_off_counts_for_no_time_to_a_token():
    record = records.opened()
    ended = record.origin.arrived + timedelta(seconds=9)
    cut = record.settle(
        State.INTERRUPTED, TokenUsage(1, 0, 5), ended=ended, ttft_s=1.0, reason="client_gone"
    )
    found = measured(cut)
    assert list(found) == [(DURATION.name, labels("priority", "priority", "client_gone"))]


def test_whole_answers_have_no_time_to_a_first_token():
    found = measured(records.completed(stream=False))
    one = labels("priority", "priority")
    assert (found[DURATION.name, one].count, found[TTFT.name, one].count) == (1, 0)


def test_every_tier_of_a_model_is_there_before_its_first_request():
    found = measured(models=["m"])
    for tier in Tier:
        for metric in (DURATION, TTFT, PER_TOKEN):
            assert found[metric.name, labels(tier, tier)].count == 0
