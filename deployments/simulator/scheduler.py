"""Which requests run and which wait. Pure: it holds no clock and starts nothing itself.

The order is that of vLLM 0.32's and TensorRT-LLM's waiting queues, a heap on (priority, arrival)
without aging, and of SGLang 0.5's. As SGLang, and vLLM with Frontline's scheduler, it may also give
the slot of a running request to a waiting one. The bounds of Frontline's scheduler on how often and
how long one request is suspended are not imitated.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import NamedTuple

PREEMPTION_GAP = 50
"""How much worse a running request must be to lose its slot, on vLLM and SGLang as Frontline starts
them."""

REMEMBERED_STARTS = 4096
"""How many starts are remembered; enough for a test of the order, bounded for a long run."""


class JobState(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Job:
    """One request, as the scheduler sees it.

    ``urgency`` is the priority in one sign for all engines: the lowest goes first.
    """

    number: int
    priority: float
    urgency: float
    arrival: int
    state: JobState = JobState.WAITING


class Start(NamedTuple):
    """A remembered start: the request's number and its priority as the engine took it."""

    number: int
    priority: float


class Changes(NamedTuple):
    """The jobs whose state a call has changed, besides the one that it was about."""

    started: tuple[Job, ...] = ()
    preempted: tuple[Job, ...] = ()


_NO_CHANGES = Changes()


@dataclass(slots=True)
class BatchScheduler:
    """At most ``slots`` jobs run; the others wait in order of urgency, then of arrival.

    With ``fcfs`` the order is that of arrival alone. With ``preempts`` a newcomer takes the slot
    of the least urgent running job if that is worse by more than ``PREEMPTION_GAP``. With
    ``keeps_place`` the job that lost it waits where its arrival puts it, as in vLLM; otherwise as
    one that arrived last, as in SGLang.
    """

    slots: int
    fcfs: bool = False
    lower_goes_first: bool = True
    preempts: bool = False
    keeps_place: bool = False
    max_running: int = 0
    preemptions: int = 0
    starts: deque[Start] = field(default_factory=lambda: deque(maxlen=REMEMBERED_STARTS))
    _running: set[Job] = field(default_factory=set)
    _heap: list[tuple[float, int, Job]] = field(default_factory=list)
    _waiting: int = 0
    _arrivals: count[int] = field(default_factory=count)

    @property
    def running(self) -> int:
        """How many jobs run now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many jobs wait now."""
        return self._waiting

    def submit(self, number: int, priority: float) -> tuple[Job, Changes]:
        """Take a new job; it runs at once if there is room, which its state tells."""
        job = Job(number, priority, self._urgency(priority), next(self._arrivals))
        if len(self._running) < self.slots:
            assert not self._waiting, "nobody waits while a slot is free"
            self._run(job)
            return job, _NO_CHANGES
        victim = self._victim(job)
        if victim is None:
            self._enqueue(job)
            return job, _NO_CHANGES
        self._preempt(victim)
        self._run(job)
        return job, Changes(preempted=(victim,))

    def finish(self, job: Job) -> Changes:
        """End a job, whether it was served or given up, running or waiting; once is enough."""
        if job.state is JobState.OVER:
            return _NO_CHANGES
        was_running = job.state is JobState.RUNNING
        job.state = JobState.OVER
        if not was_running:
            self._waiting -= 1  # its heap entry is dropped when it comes to the top
            return _NO_CHANGES
        self._running.remove(job)
        return Changes(started=self._fill()) if self._waiting else _NO_CHANGES

    def forget(self) -> None:
        """Start the counts and the record of starts anew."""
        self.starts.clear()
        self.max_running, self.preemptions = len(self._running), 0

    def _urgency(self, priority: float) -> float:
        if self.fcfs:
            return 0.0
        return priority if self.lower_goes_first else -priority

    def _victim(self, job: Job) -> Job | None:
        if not self.preempts:
            return None
        worst = max(self._running, key=lambda running: (running.urgency, running.arrival))
        return worst if worst.urgency - job.urgency > PREEMPTION_GAP else None

    def _preempt(self, job: Job) -> None:
        self._running.remove(job)
        self.preemptions += 1
        if not self.keeps_place:
            job.arrival = next(self._arrivals)
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        job.state = JobState.WAITING
        self._waiting += 1
        heapq.heappush(self._heap, (job.urgency, job.arrival, job))

    def _run(self, job: Job) -> None:
        job.state = JobState.RUNNING
        self._running.add(job)
        self.max_running = max(self.max_running, len(self._running))
        self.starts.append(Start(job.number, job.priority))

    def _fill(self) -> tuple[Job, ...]:
        started = []
        while self._waiting and len(self._running) < self.slots:
            job = heapq.heappop(self._heap)[2]
            if job.state is JobState.WAITING:
                self._waiting -= 1
                self._run(job)
                started.append(job)
        return tuple(started)
