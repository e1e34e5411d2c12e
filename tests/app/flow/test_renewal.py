"""What an ingress reports of its traffic."""

import pytest

from app.contracts.traffic import Outcome, Traffic
from app.flow.renewal import TrafficReports

pytestmark = pytest.mark.unit


@pytest.fixture
def traffic():
    return Traffic()


@pytest.fixture
def reports(traffic):
    return TrafficReports({"m": traffic}.__getitem__)


def shed(traffic):
    traffic.add(Outcome(None, None, "shed", "queue_full"), None)


def test_what_the_model_knows_is_not_sent_again(traffic, reports):
    first = reports.due("m")
    assert first is not None and first is not traffic
    reports.received("life", first)
    assert reports.due("m") is None
    shed(traffic)
    assert reports.due("m").requests == 1


def test_what_was_lost_is_sent_again(traffic, reports):
    shed(traffic)
    lost = reports.due("m")
    assert reports.due("m").requests == lost.requests


def test_what_came_up_on_the_way_is_sent_next(traffic, reports):
    sent = reports.due("m")
    shed(traffic)
    assert sent.requests == 0, "it does not change on the way"
    reports.received("life", sent)
    assert reports.due("m").requests == 1


def test_a_restarted_model_gets_everything(traffic, reports):
    shed(traffic)
    reports.received("life", reports.due("m"))
    reports.received("another", None)
    assert reports.due("m").requests == 1
    reports.received("another", reports.due("m"))
    reports.received("another", None)
    assert reports.due("m") is None
