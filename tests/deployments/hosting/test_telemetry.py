import pytest

from app import alarms
from app.upstream.http1 import ConnectionLost
from deployments.engines.metrics import Role, engine_metrics
from deployments.hosting.telemetry import ReplicaTelemetry
from tests.support.metrics import MemoryMetrics

pytestmark = pytest.mark.unit

WANTED = engine_metrics({Role.RUNNING: "e:running", Role.PREEMPTIONS: "e:preempted_total"})
GOOD = 'e:running{x="1"} 3\ne:preempted_total 5\n'
LABELS = {"model_name": "m", "pool": "p"}


class AnEngine:
    def __init__(self, *answers):
        self.answers = list(answers)

    async def get_text(self, path):
        assert path == "/metrics"
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def telemetry(engine):
    backend = MemoryMetrics()
    return ReplicaTelemetry("m", "p", engine.get_text, "/metrics", WANTED, backend), backend


async def test_chosen_metrics_are_relayed_with_model_and_pool():
    made, backend = telemetry(AnEngine((200, GOOD), (200, GOOD.replace(" 5", " 7"))))
    for preempted in (5, 7):
        assert await made.read()
        await made.exporter.push()
        assert backend.of("e_running", **LABELS) == 3
        assert backend.of("e_preempted_total", **LABELS) == preempted


@pytest.mark.parametrize(
    "answer",
    [ConnectionLost("gone"), TimeoutError(), (500, ""), (200, "e:running{ 3")],
)
async def test_a_read_that_fails_is_counted_and_nothing_old_is_shown(answer, monkeypatch):
    raised = alarms.Alarms()
    monkeypatch.setattr("app.alarms.PROCESS", raised)
    made, backend = telemetry(AnEngine((200, GOOD), answer))
    assert await made.read() and await made.read()
    await made.exporter.push()
    assert "e_running" not in backend.names()
    assert backend.of("frontline_engine_scrapes_failed_total", **LABELS) == 1
    assert raised.counts() == {"engine metrics": 1}


async def test_an_engine_without_metrics_is_asked_once():
    made, backend = telemetry(AnEngine((404, "")))
    assert not await made.read()
    await made.exporter.push()
    assert backend.of("frontline_engine_scrapes_failed_total", **LABELS) == 0
