import pytest

from app.alarms import EVERY_S, Alarms

pytestmark = pytest.mark.unit


def test_every_alarm_is_counted_and_few_are_logged(caplog):
    now = [0.0]
    alarms = Alarms(lambda: now[0])
    for _ in range(100):
        alarms.raised("odd usage", "replica told none")
    alarms.raised("other", "x", ValueError("why"))
    assert alarms.counts() == {"odd usage": 100, "other": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "odd usage: replica told none; 1 times so far",
        "other: x; 1 times so far",
    ]
    assert "ValueError: why" in caplog.text
    now[0] = EVERY_S
    alarms.raised("odd usage", "replica told none")
    assert "101 times" in caplog.records[-1].getMessage()
