"""Which requests run and which wait. Pure: the clock is passed in, and it starts nothing itself.

The order is that of vLLM 0.32's and TensorRT-LLM's waiting queues, a heap on (priority, arrival)
without aging, and of SGLang 0.5's. As SGLang, and vLLM with Frontline's scheduler, it may also give
the slot of a running request to a waiting one. The decision is that of Frontline's scheduler,
``frontline_preemption``; SGLang has its margin alone, and none of its bounds.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import NamedTuple

from frontline_preemption import History, Rules, Running, Waiting, choose_victims

MARGIN_ALONE = Rules(
    tokens_between=0, most_preemptions=2**31, nearly_done=-1, longest_suspended_s=math.inf
)
"""SGLang's rules: any running request that is worse by the margin may lose its slot."""

REMEMBERED_STARTS = 4096
"""How many starts are recorded: enough to test the order, and bounded for a long run."""


class JobState(Enum):
    """The state of a request."""

    WAITING = auto()
    RUNNING = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Job:
    """One request, as the scheduler sees it.

    ``urgency`` is the priority in one sign for all engines: the lowest goes first. ``history`` is
    how often and how long it was suspended.
    """

    number: int
    priority: float
    urgency: float
    arrival: int
    state: JobState = JobState.WAITING
    history: History = field(default_factory=History)


Progress = Callable[[Job], tuple[int, int]]
"""Returns how many tokens a running job has generated, and how many it may still generate."""


class Start(NamedTuple):
    """A recorded start: the request's number and its priority as the engine read it."""

    number: int
    priority: float


class Changes(NamedTuple):
    """The other jobs whose state a call has changed."""

    started: tuple[Job, ...] = ()
    preempted: tuple[Job, ...] = ()


_NO_CHANGES = Changes()


@dataclass(slots=True)
class BatchScheduler:
    """At most ``slots`` jobs run; the others wait in order of urgency, then of arrival.

    With ``fcfs`` the order is that of arrival alone. With ``preempts`` a waiting job takes the slot
    of the least urgent running one, if the ``rules`` allow it. With ``keeps_place`` the job that
    lost it waits where its arrival puts it, as in vLLM; otherwise as one that arrived last, as in
    SGLang.
    """

    slots: int
    fcfs: bool = False
    lower_goes_first: bool = True
    preempts: bool = False
    keeps_place: bool = False
    rules: Rules = MARGIN_ALONE
    progress: Progress = lambda job: (0, 1)
    max_running: int = 0
    preemptions: int = 0
    starts: deque[Start] = field(default_factory=lambda: deque(maxlen=REMEMBERED_STARTS))
    _running: set[Job] = field(default_factory=set)
    _heap: list[tuple[float, int, Job]] = field(default_factory=list)
    _waiting: int = 0
    _suspended: set[Job] = field(default_factory=set)
    _suspended_s: float = 0.0
    _arrivals: count[int] = field(default_factory=count)

    @property
    def running(self) -> int:
        """How many jobs run now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many jobs wait now."""
        return self._waiting

    @property
    def suspended(self) -> int:
        """How many jobs are suspended now."""
        return len(self._suspended)

    def suspended_s(self, now: float) -> float:
        """For how long jobs were suspended, all together."""
        return self._suspended_s + sum(
            job.history.total_s(now) - job.history.suspended_s for job in self._suspended
        )

    @property
    def wants_room(self) -> bool:
        """Whether a waiting job is better than a running one, which the rules protect so far."""
        return self.preempts and self._margin_to_worst() > self.rules.margin

    def submit(self, number: int, priority: float, now: float = 0.0) -> tuple[Job, Changes]:
        """Take a new job; it runs at once if there is room, which its state tells."""
        job = Job(number, priority, self._urgency(priority), next(self._arrivals))
        if len(self._running) < self.slots:
            assert not self._waiting, "nobody waits while a slot is free"
            self._run(job, now)
            return job, _NO_CHANGES
        self._enqueue(job)
        started, preempted = self.make_room(now)
        return job, Changes(tuple(one for one in started if one is not job), preempted)

    def make_room(self, now: float) -> Changes:
        """Suspend running jobs for better waiting ones, as far as the rules allow it now."""
        self._raise_suspended(now)
        if not self.wants_room:
            return _NO_CHANGES
        running = list(self._running)
        waiting = heapq.nsmallest(len(running), (one for one in self._heap if self._waits(one)))
        chosen = choose_victims(
            [self._seen(job) for job in running],
            [Waiting(int(urgency)) for urgency, _, _ in waiting],
            free_slots=max(0, self.slots - len(running)),
            free_blocks=0,
            blocks_of=lambda index: (),
            rules=self.rules,
        )
        victims = tuple(running[index] for index in chosen)
        for job in victims:
            self._preempt(job, now)
        return Changes(self._fill(now), victims)

    def resize(self, slots: int, now: float) -> Changes:
        """Run at most so many jobs from now on. Those that run stay, even if there are more."""
        self.slots = slots
        return Changes(self._fill(now))

    def finish(self, job: Job, now: float = 0.0) -> Changes:
        """End a job, whether it was served or given up, running or waiting; once is enough."""
        if job.state is JobState.OVER:
            return _NO_CHANGES
        was_running = job.state is JobState.RUNNING
        job.state = JobState.OVER
        self._note_resumed(job, now)
        if not was_running:
            self._waiting -= 1  # its heap entry is dropped when it comes to the top
            return _NO_CHANGES
        self._running.remove(job)
        return Changes(started=self._fill(now)) if self._waiting else _NO_CHANGES

    def forget(self) -> None:
        """Reset the counts and the recorded starts."""
        self.starts.clear()
        self.max_running, self.preemptions = len(self._running), 0

    def _urgency(self, priority: float) -> float:
        if self.fcfs:
            return 0.0
        return priority if self.lower_goes_first else -priority

    def _margin_to_worst(self) -> float:
        """Return by how much the worst running job is worse than the best waiting one."""
        while self._heap and not self._waits(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap or not self._running:
            return -math.inf
        return max(job.urgency for job in self._running) - self._heap[0][0]

    def _waits(self, entry: tuple[float, int, Job]) -> bool:
        """Return whether an entry of the heap is that of a waiting job, as it is now."""
        urgency, arrival, job = entry
        return job.state is JobState.WAITING and (urgency, arrival) == (job.urgency, job.arrival)

    def _seen(self, job: Job) -> Running:
        generated, left = self.progress(job)
        return Running(
            priority=int(job.urgency),
            arrival=job.arrival,
            tokens_left=left,
            preemptions=job.history.preemptions,
            tokens_since=generated - job.history.tokens,
        )

    def _raise_suspended(self, now: float) -> None:
        """Count jobs that were suspended for too long as ones of the best tier."""
        best = float(self.rules.best_priority)
        for job in self._suspended:
            if job.history.total_s(now) > self.rules.longest_suspended_s and job.urgency > best:
                job.urgency = best
                heapq.heappush(self._heap, (job.urgency, job.arrival, job))

    def _preempt(self, job: Job, now: float) -> None:
        generated, _ = self.progress(job)
        job.history.suspend(generated, now)
        self._suspended.add(job)
        self._running.remove(job)
        self.preemptions += 1
        if not self.keeps_place:
            job.arrival = next(self._arrivals)
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        job.state = JobState.WAITING
        self._waiting += 1
        heapq.heappush(self._heap, (job.urgency, job.arrival, job))

    def _note_resumed(self, job: Job, now: float) -> None:
        if job in self._suspended:
            self._suspended.discard(job)
            self._suspended_s += job.history.resume(now)

    def _run(self, job: Job, now: float) -> None:
        self._note_resumed(job, now)
        job.state = JobState.RUNNING
        self._running.add(job)
        self.max_running = max(self.max_running, len(self._running))
        self.starts.append(Start(job.number, job.priority))

    def _fill(self, now: float) -> tuple[Job, ...]:
        started = []
        while self._waiting and len(self._running) < self.slots:
            entry = heapq.heappop(self._heap)
            if self._waits(entry):
                job = entry[2]
                self._waiting -= 1
                self._run(job, now)
                started.append(job)
        return tuple(started)
