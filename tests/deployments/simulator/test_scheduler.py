"""The simulated engine's scheduler and pace: properties, without a clock."""

from __future__ import annotations

import pytest
from frontline_preemption import Rules
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deployments.simulator.pacing import Pace
from deployments.simulator.scheduler import (
    MARGIN_ALONE,
    BatchScheduler,
    Changes,
    Job,
    JobState,
)

pytestmark = pytest.mark.unit

PRIORITIES = st.integers(-120, 120)


class SchedulerMachine(RuleBasedStateMachine):
    """Submits and ends jobs in any order, beside a plain model of what must hold."""

    scheduler: BatchScheduler

    @initialize(
        slots=st.integers(1, 4),
        fcfs=st.booleans(),
        lower_goes_first=st.booleans(),
        preempts=st.booleans(),
        keeps_place=st.booleans(),
    )
    def start(
        self, slots: int, fcfs: bool, lower_goes_first: bool, preempts: bool, keeps_place: bool
    ) -> None:
        self.scheduler = BatchScheduler(slots, fcfs, lower_goes_first, preempts, keeps_place)
        self.jobs: list[Job] = []
        self.arrivals: dict[Job, int] = {}
        self.clock = 0

    def _urgency(self, job: Job) -> float:
        if self.scheduler.fcfs:
            return 0
        return job.priority if self.scheduler.lower_goes_first else -job.priority

    def _standing(self, job: Job) -> tuple[float, int]:
        return self._urgency(job), self.arrivals[job]

    def _arrive(self, job: Job) -> None:
        self.clock += 1
        self.arrivals[job] = self.clock

    def _of(self, state: JobState) -> list[Job]:
        return [job for job in self.jobs if job.state is state]

    @rule(priority=PRIORITIES)
    def submit(self, priority: int) -> None:
        before = self._of(JobState.RUNNING)
        job, changes = self.scheduler.submit(len(self.jobs), priority)
        self.jobs.append(job)
        self._arrive(job)
        assert not changes.started, "a newcomer starts nobody else"
        if changes.preempted:
            (victim,) = changes.preempted
            assert self.scheduler.preempts
            assert victim in before and victim.state is JobState.WAITING
            assert self._urgency(victim) - self._urgency(job) > MARGIN_ALONE.margin
            if not self.scheduler.keeps_place:
                self._arrive(victim)
        running = len(before) < self.scheduler.slots or bool(changes.preempted)
        assert (job.state is JobState.RUNNING) == running

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        present = self._of(JobState.RUNNING) + self._of(JobState.WAITING)
        if not present:
            return
        job = data.draw(st.sampled_from(present))
        waiting = sorted(
            (other for other in self._of(JobState.WAITING) if other is not job), key=self._standing
        )
        freed = job.state is JobState.RUNNING
        changes = self.scheduler.finish(job)
        assert list(changes.started) == (waiting[:1] if freed else []), "the slot goes to the first"
        assert job.state is JobState.OVER
        assert self.scheduler.finish(job) == Changes(), "once is enough"

    @invariant()
    def the_counts_are_true(self) -> None:
        assert self.scheduler.running == len(self._of(JobState.RUNNING))
        assert self.scheduler.waiting == len(self._of(JobState.WAITING))

    @invariant()
    def slots_are_used_and_never_exceeded(self) -> None:
        assert self.scheduler.running <= self.scheduler.slots
        assert self.scheduler.max_running <= self.scheduler.slots
        assert not self.scheduler.waiting or self.scheduler.running == self.scheduler.slots

    def teardown(self) -> None:
        """No job is lost: all that wait run once those before them are over."""
        while hasattr(self, "jobs") and (running := self._of(JobState.RUNNING)):
            self.scheduler.finish(running[0])
        assert not hasattr(self, "jobs") or all(job.state is JobState.OVER for job in self.jobs)


TestScheduler = SchedulerMachine.TestCase


def order_of(scheduler: BatchScheduler, priorities: list[int]) -> list[int]:
    """Return the priorities of jobs in the order in which one busy slot starts them."""
    job, _ = scheduler.submit(-1, 0)
    for number, priority in enumerate(priorities):
        scheduler.submit(number, priority)
    while started := scheduler.finish(job).started:
        (job,) = started
    return [int(start.priority) for start in scheduler.starts][1:]


@given(st.lists(PRIORITIES, max_size=12))
def test_waiting_jobs_start_in_the_order_of_their_sign(priorities: list[int]) -> None:
    assert order_of(BatchScheduler(1), priorities) == sorted(priorities)
    high_first = order_of(BatchScheduler(1, lower_goes_first=False), priorities)
    assert high_first == sorted(priorities, reverse=True)
    assert order_of(BatchScheduler(1, fcfs=True), priorities) == priorities


RULES = Rules()


class Generating(BatchScheduler):
    """A scheduler whose running jobs have generated so many tokens."""

    def __init__(self, slots: int, left: int = 1000) -> None:
        super().__init__(
            slots,
            preempts=True,
            keeps_place=True,
            rules=RULES,
            progress=lambda job: (self.generated.get(job, 0), left),
        )
        self.generated: dict[Job, int] = {}


def test_a_job_that_is_nearly_done_runs_to_its_end() -> None:
    scheduler = Generating(1, left=RULES.nearly_done)
    first, _ = scheduler.submit(0, 0)
    urgent, changes = scheduler.submit(1, -100)
    assert changes == Changes() and scheduler.wants_room
    assert scheduler.finish(first).started == (urgent,)


def test_a_job_that_has_just_resumed_generates_some_tokens_first() -> None:
    scheduler = Generating(1)
    low, _ = scheduler.submit(0, 100)
    urgent, changes = scheduler.submit(1, -100)
    assert changes.preempted == (low,) and urgent.state is JobState.RUNNING
    assert scheduler.finish(urgent).started == (low,)
    again, changes = scheduler.submit(2, -100)
    assert changes == Changes() and scheduler.wants_room
    scheduler.generated[low] = RULES.tokens_between
    assert scheduler.make_room(0.0) == Changes((again,), (low,))
    assert not scheduler.wants_room


def test_nobody_is_suspended_more_often_than_the_rules_allow() -> None:
    scheduler = Generating(1)
    low, _ = scheduler.submit(0, 100)
    for number in range(RULES.most_preemptions + 1):
        scheduler.generated[low] = 1000 * number
        urgent, changes = scheduler.submit(1 + number, -100)
        assert bool(changes.preempted) == (number < RULES.most_preemptions)
        scheduler.finish(urgent)
    assert scheduler.preemptions == RULES.most_preemptions


def test_a_job_that_was_suspended_for_long_counts_as_one_of_the_best_tier() -> None:
    scheduler = Generating(1)
    low, _ = scheduler.submit(0, 100)
    urgent, _ = scheduler.submit(1, -100, now=0.0)
    scheduler.submit(2, -100, now=1.0)
    late = RULES.longest_suspended_s + 2
    assert scheduler.suspended == 1 and scheduler.suspended_s(late) == late
    scheduler.submit(3, -100, now=late)
    assert scheduler.finish(urgent, late).started == (low,)
    assert scheduler.suspended == 0 and scheduler.suspended_s(late + 9) == late
    assert scheduler.submit(4, -100, now=late)[1] == Changes(), "it is not suspended again"


def test_sglang_has_no_such_bounds() -> None:
    scheduler = BatchScheduler(1, preempts=True)
    low, _ = scheduler.submit(0, 100)
    for number in range(1, 50):
        urgent, changes = scheduler.submit(number, -100)
        assert changes.preempted == (low,)
        scheduler.finish(urgent)


@given(
    first_at=st.floats(0, 1e6),
    seconds_per_token=st.floats(1e-4, 10),
    done=st.integers(0, 1000),
    further=st.integers(1, 5000),
)
def test_a_token_is_due_when_it_is_said_to_be(
    first_at: float, seconds_per_token: float, done: int, further: int
) -> None:
    pace = Pace(first_at, seconds_per_token, done)
    token = done + further
    assert pace.due(pace.at(token) + seconds_per_token / 10) == token
    assert pace.due(first_at - 1) == done


def test_without_a_pace_all_tokens_are_due_with_the_first() -> None:
    pace = Pace(first_at=10.0, seconds_per_token=0.0)
    assert pace.due(9.99) == 0
    assert pace.due(10.0) > 10**9
    assert pace.at(5000) == 10.0
