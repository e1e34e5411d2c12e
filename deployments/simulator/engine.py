"""The engine behind the HTTP server: requests wait for slots and generate tokens by the clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from frontline_preemption import Rules

from deployments.simulator.generation import Choice, answers
from deployments.simulator.language import PrefixCache, Vocabulary
from deployments.simulator.observations import Observations, Timings
from deployments.simulator.pacing import Pace, Wheel
from deployments.simulator.requests import Wish
from deployments.simulator.scheduler import MARGIN_ALONE, BatchScheduler, Changes, Job, JobState
from deployments.simulator.settings import (
    Change,
    DialectName,
    InjectedFailures,
    Policy,
    SimulatedSettings,
)

_STEP_S = 0.001
"""How long a step takes in an engine without a pace."""

Receive = Callable[[], Awaitable[object]]
"""Returns when the client has disconnected."""


class GivenUpError(Exception):
    """The engine has aborted a request because its client has disconnected."""


class Engine:
    """Owns the slots, the clock and the vocabulary. Independent of HTTP."""

    def __init__(self, settings: SimulatedSettings, loop: asyncio.AbstractEventLoop) -> None:
        self.settings = settings
        self.observations = Observations(settings.remembered_requests)
        self.timings = Timings()
        self.scheduler = BatchScheduler(
            settings.slots,
            fcfs=settings.policy is Policy.FCFS,
            lower_goes_first=settings.lower_goes_first,
            preempts=settings.preempts,
            keeps_place=settings.dialect is DialectName.VLLM,
            rules=Rules() if settings.dialect is DialectName.VLLM else MARGIN_ALONE,
            progress=lambda job: self._runs[job].progress(),
        )
        self.wheel = Wheel(loop)
        self.loop = loop
        self._vocabulary = Vocabulary(settings.seed)
        self._cache = PrefixCache(settings.cached_blocks)
        self._runs: dict[Job, Run] = {}
        self._looks = False
        self._failures_since = 0

    def failure_of(self, number: int) -> InjectedFailures | None:
        """Return the failure to inject into a request, or ``None``."""
        failures = self.settings.failures
        return failures if failures.strikes(number - self._failures_since) else None

    def change(self, change: Change) -> None:
        """Apply changed settings."""
        if change.forget:
            self.observations.forget()
            self.scheduler.forget()
            self._failures_since = 0
        if change.failures is not None:
            self._failures_since = self.observations.received
        given = {
            name: getattr(change, name)
            for name in change.model_fields_set - {"forget"}
            if getattr(change, name) is not None
        }
        self.settings = self.settings.model_copy(update=given)
        self.scheduler.preempts = self.settings.preempts
        if self.settings.slots != self.scheduler.slots:
            self._apply(self.scheduler.resize(self.settings.slots, time.monotonic()))

    def answers(self, wish: Wish) -> tuple[list[Choice], int]:
        """Return the choices of a request's answer, and how many prompt tokens were cached."""
        choices, cached = answers(wish, self.settings, self._vocabulary, self._cache)
        self.timings.prompt_tokens += sum(len(prompt.tokens) for prompt in wish.prompts)
        self.timings.cached_tokens += cached
        return choices, cached

    @property
    def full(self) -> bool:
        """Whether the engine rejects further requests."""
        limit, scheduler = self.settings.max_waiting, self.scheduler
        return (
            limit is not None
            and scheduler.running >= scheduler.slots
            and scheduler.waiting >= limit
        )

    def admit(
        self, number: int, priority: float, total: int, computed: int, client: Receive
    ) -> Run:
        """Take in a request for ``total`` tokens, of whose prompt ``computed`` are computed."""
        job, changes = self.scheduler.submit(number, priority, time.monotonic())
        settings = self.settings
        to_first = settings.first_token_seconds + computed * settings.prefill_seconds_per_token
        run = Run(self, job, total, to_first, client)
        self._runs[job] = run
        self._apply(changes)
        return run

    def finish(self, job: Job) -> None:
        """End a request, and start the next one in its slot."""
        self._runs.pop(job, None)
        self._apply(self.scheduler.finish(job, time.monotonic()))

    def give_up(self, job: Job) -> None:
        """Abort a request whose client has disconnected."""
        if job.state is not JobState.OVER:
            self.observations.aborted += 1
            run = self._runs[job]
            self.finish(job)
            run.wake()

    def _apply(self, changes: Changes) -> None:
        for job in changes.preempted:
            self._runs[job].lose_slot()
        for job in changes.started:
            self._runs[job].wake()
        if self.scheduler.wants_room and not self._looks:
            # As an engine does at each step: a running request may be suspended a few tokens later.
            speed = self.settings.tokens_per_second
            self._looks = True
            self.loop.call_later(1 / speed if speed else _STEP_S, self._look)

    def _look(self) -> None:
        self._looks = False
        self._apply(self.scheduler.make_room(time.monotonic()))


class Run:
    """One request inside the engine, from its arrival to its last token."""

    __slots__ = (
        "_came", "_client", "_done", "_engine", "_pace", "_to_first", "_total", "_waker",
        "_watcher", "job",
    )  # fmt: skip

    def __init__(
        self, engine: Engine, job: Job, total: int, to_first: float, client: Receive
    ) -> None:
        self.job = job
        self._engine, self._client = engine, client
        self._total, self._to_first = total, to_first
        self._done = 0
        # When it arrived; `None` once its wait and its time to the first token are known.
        self._came: float | None = time.monotonic()
        self._pace: Pace | None = None
        self._waker: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def advance(self, target: int) -> int:
        """Wait until ``target`` tokens are generated; return how many there are.

        Raises:
            GivenUpError: the client has disconnected.
        """
        while True:
            if self.job.state is JobState.OVER:
                raise GivenUpError
            if self.job.state is JobState.RUNNING:
                now = time.monotonic()
                pace = self._pace or self._start(now)
                self._done = min(pace.due(now), self._total)
                if self._done >= target:
                    return self._done
                await self._pause(self._engine.wheel.wait_until(pace.at(target)))
            else:
                await self._pause(self._engine.loop.create_future())

    async def stall(self) -> None:
        """Generate nothing more, and keep the slot until the client has disconnected."""
        while self.job.state is not JobState.OVER:
            await self._pause(self._engine.loop.create_future())

    def wake(self) -> None:
        """Wake ``advance``: the request was started or aborted."""
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    def progress(self) -> tuple[int, int]:
        """Return how many tokens are generated, and how many are left."""
        done = self._done
        if self._pace is not None:
            done = min(self._pace.due(time.monotonic()), self._total)
        return done, self._total - done

    def lose_slot(self) -> None:
        """Stop generating; the prompt is computed again when the request gets a slot."""
        if self._pace is not None:
            self._done = min(self._pace.due(time.monotonic()), self._total)
            self._pace = None
        self.wake()

    def finish(self) -> None:
        """Free the slot."""
        self._engine.finish(self.job)

    def _start(self, now: float) -> Pace:
        if self._came is not None:
            waited, self._came = now - self._came, None
            self._engine.timings.queue.add(waited)
            self._engine.timings.ttft.add(waited + self._to_first)
        speed = self._engine.settings.tokens_per_second
        self._pace = Pace(now + self._to_first, 1 / speed if speed else 0.0, self._done)
        return self._pace

    async def _pause(self, waker: asyncio.Future[None]) -> None:
        self._waker = waker
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        await waker

    async def _watch(self) -> None:
        await self._client()
        await asyncio.sleep(self._engine.settings.disconnect_seconds)
        self._engine.give_up(self.job)
