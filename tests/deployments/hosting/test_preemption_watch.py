import asyncio
import logging
from dataclasses import replace

import pytest

from app import alarms, supervision
from app.contracts.status import Preempted, ReplicaStatus
from app.core.dialect import Dialect, Route
from app.core.tiers import Tier
from app.upstream.http1 import ConnectionLost
from deployments.engines.base import PreemptionReport
from deployments.hosting import preemption_watch
from deployments.hosting.preemption_watch import PreemptionWatch

pytestmark = pytest.mark.unit

DIALECT = Dialect("vllm", False, dict.fromkeys(Tier, 0), frozenset(Route), preempts=True)
STATUS = ReplicaStatus("r", "pool", "http://x", "key", 8, "0.32", None, DIALECT)
WORKS = PreemptionReport(True, "", Preempted(3, 1, 2.5))
FAILED = PreemptionReport(False, "it has failed", Preempted(4, 0, 3.0))


class Engine:
    def __init__(self, *answers):
        self.answers = list(answers)

    async def ask(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def watch(*answers, status=STATUS):
    return PreemptionWatch(status, Engine(*answers).ask)


async def test_counts_are_kept_and_no_ingress_gets_a_status_that_differs_in_them_alone():
    watched = watch(WORKS)
    await watched.look()
    assert watched.status.preempted == WORKS.counts
    assert watched.status == STATUS, "equal, so it is not published"


async def test_an_engine_whose_decision_fails_preempts_no_more(caplog):
    before = alarms.PROCESS.counts().get("preemption lost", 0)
    watched = watch(WORKS, FAILED, FAILED, WORKS)
    with caplog.at_level(logging.ERROR):
        for preempts in (True, False, False, False):
            await watched.look()
            assert watched.status.preempts is preempts
    assert alarms.PROCESS.counts()["preemption lost"] == before + 1, "once"
    assert "it has failed" in caplog.text and "key" not in caplog.text
    lost = replace(STATUS, dialect=replace(DIALECT, preempts=False))
    assert watched.status == lost != STATUS


async def test_an_engine_that_proved_nothing_at_its_start_never_preempts():
    watched = watch(WORKS, status=replace(STATUS, dialect=replace(DIALECT, preempts=False)))
    await watched.look()
    assert not watched.status.preempts


async def test_without_an_answer_the_last_one_stays_and_the_failure_is_counted(monkeypatch):
    monkeypatch.setattr(preemption_watch, "LOOK_S", 0)
    lost = ConnectionLost("gone")
    watched = watch(WORKS, None, lost, TimeoutError(), FAILED)
    before = count_of_failures()
    task = supervision.run_once("test", watched.run)
    async with asyncio.timeout(5):
        while watched.status.preempts:
            await asyncio.sleep(0)
    await supervision.stop(task)
    assert count_of_failures() >= before + 2


def count_of_failures():
    failures = supervision.PROCESS.failures().get("preemption watch")
    return failures.count if failures else 0
