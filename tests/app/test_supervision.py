import asyncio
import threading
import time

import pytest

from app import supervision
from app.supervision import Registry, keep_running, keep_thread, run_once, stop

pytestmark = pytest.mark.unit


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    return Registry()


class Work:
    """Fails so many times, then does what it is told to."""

    def __init__(self, failures):
        self.left, self.runs = failures, 0

    def fail(self):
        self.runs += 1
        if self.left:
            self.left -= 1
            raise RuntimeError("broken")

    async def end(self):
        self.fail()

    async def go_on(self):
        self.fail()
        await asyncio.Event().wait()


async def until(condition, within_s=5.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_task_that_fails_is_restarted_counted_and_logged(registry, caplog):
    work = Work(3)
    await keep_running("reader", work.end, registry)
    assert work.runs == 4
    failures = registry.failures()["reader"]
    assert (failures.count, failures.restarts, failures.last_error) == (3, 3, "RuntimeError")
    assert len(caplog.records) == 3
    assert all("reader" in record.message and record.exc_info for record in caplog.records)


async def test_a_cancelled_task_ends_and_counts_as_no_failure(registry):
    work = Work(0)
    task = keep_running("reader", work.go_on, registry)
    await until(lambda: work.runs)
    await stop(task, None)
    assert task.cancelled() and not registry.failures()


async def test_a_task_goes_on_when_what_it_waits_for_is_cancelled(registry):
    inner = asyncio.get_running_loop().create_future()
    runs = []

    async def work():
        runs.append(None)
        if len(runs) == 1:
            await inner

    task = keep_running("reader", work, registry)
    await until(lambda: runs)
    inner.cancel()
    await task
    assert len(runs) == 2 and registry.failures()["reader"].last_error == "CancelledError"


async def test_a_task_that_runs_once_reports_its_failure_and_is_not_restarted(registry, caplog):
    work = Work(1)
    await run_once("closer", work.end, registry)
    assert work.runs == 1
    assert (registry.failures()["closer"].count, registry.failures()["closer"].restarts) == (1, 0)
    assert "not restarted" in caplog.text


async def test_a_task_that_was_cancelled_before_it_began_leaves_nothing(registry):
    await stop(run_once("closer", Work(1).end, registry))
    assert not registry.failures()


def test_a_thread_that_fails_is_restarted_counted_and_logged(registry, caplog):
    work = Work(2)
    keep_thread("writer", work.fail, registry=registry).join(5.0)
    assert work.runs == 3
    assert registry.failures()["writer"].restarts == 2
    assert all(record.exc_info for record in caplog.records)


def test_a_thread_that_is_told_to_stop_does_not_wait_for_its_restart(registry, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 60.0)
    work, ending = Work(10), threading.Event()
    thread = keep_thread("writer", work.fail, stop=ending, registry=registry)
    while not registry.failures():
        time.sleep(0.005)
    ending.set()
    thread.join(5.0)
    assert not thread.is_alive() and work.runs == 1


def test_pauses_double_up_to_the_longest_and_start_anew_after_a_good_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("app.supervision.time.monotonic", lambda: now[0])
    monkeypatch.setattr("app.supervision.random.uniform", lambda low, high: high)
    pauses = supervision.Pauses()
    seen = [pauses.next() for _ in range(8)]
    assert seen == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    now[0] = supervision.RECENT_S + 1
    assert pauses.next() == 0.2


def test_failures_are_recent_for_a_while(registry):
    registry.failed("reader", ValueError(), restarts=True)
    now = registry.failures()["reader"].last_at
    assert registry.recent(now + 1.0) and not registry.recent(now + supervision.RECENT_S + 1)


async def test_a_task_that_loses_its_cancellation_is_stopped_all_the_same(monkeypatch):
    """At 410afd7 the caller waited for ever."""
    monkeypatch.setattr(supervision, "CANCEL_AGAIN_S", 0.01)
    lost = []

    async def look():
        while len(lost) < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost.append(True)
        await asyncio.sleep(60)

    task = run_once("look", look, Registry())
    await asyncio.sleep(0)
    await stop(task)
    assert task.done() and len(lost) == 3
