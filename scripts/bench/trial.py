"""One endpoint under test: priority alone, default alone, then both, in one run.

    warm-up │ idle: priority, one at a time │ filling up │ alone │ together │ alone again

The saturation is one closed loop from "filling up" to the end, so that default's throughput with
and without priority is compared inside it, and drift of the machine shows on both sides.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scripts.bench.effort import Effort, Processes
from scripts.bench.load import (
    Answer,
    Endpoint,
    Load,
    Workload,
    poisson_arrivals,
    regular_arrivals,
)

Say = Callable[[str], None]

_WARM_UP_REQUESTS = 8
_LONGEST_FILLING_S = 180.0
_IDLE_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything.

    Attributes:
        clients: default-tier clients in a closed loop.
        idle_requests: priority requests while nothing else runs.
        alone_s: how long default is measured alone, before and again after.
        together_s: how long priority arrives.
        rate: priority requests a second; ``None``: ``share`` of default's own measured rate.
        share: see ``rate``.
        regular: equal distances between priority arrivals, instead of random ones.
        most: no more requests than these, in all.
    """

    clients: int
    idle_requests: int
    alone_s: float
    together_s: float
    rate: float | None
    share: float
    regular: bool
    most: int


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start

    def has(self, moment: float) -> bool:
        """Whether a moment lies in it."""
        return self.start <= moment < self.end

    def overlap(self, start: float, end: float) -> float:
        """Return which share of a stretch lies in it; an empty stretch counts as a moment."""
        if end <= start:
            return float(self.has(start))
        return max(0.0, min(end, self.end) - max(start, self.start)) / (end - start)


@dataclass(slots=True)
class Trial:
    """What was measured at one endpoint.

    Attributes:
        endpoint: its name.
        answers: every request, of all windows.
        sheds: when which tier was answered 429.
        idle: the window in which priority was alone.
        alone: the windows in which default was alone.
        together: the window in which priority arrived.
        rate: the rate at which it did.
        efforts: what generator and server took, by window.
        seconds: how long all of it took.
    """

    endpoint: str
    processes: Processes
    answers: list[Answer] = field(default_factory=list)
    sheds: list[tuple[float, str]] = field(default_factory=list)
    idle: Window = Window(0.0, 0.0)
    alone: list[Window] = field(default_factory=list)
    together: Window = Window(0.0, 0.0)
    rate: float = 0.0
    efforts: dict[str, Effort] = field(default_factory=dict)
    seconds: float = 0.0


async def run_trial(
    endpoint: Endpoint, workload: Workload, plan: Plan, say: Say, processes: Processes = dict
) -> Trial:
    """Run all of it against one endpoint."""
    load = Load(endpoint, workload, most=plan.most)
    trial, started = Trial(endpoint.name, processes, load.answers, load.sheds), time.monotonic()
    try:
        await _warm_up(load)
        say(f"{endpoint.name}: priority alone, {plan.idle_requests} requests")
        trial.idle = await _measure(trial, "idle", _idle(load, plan))
        async with asyncio.TaskGroup() as group:
            clients = [
                group.create_task(load.ask_for_ever("default", f"{endpoint.name} d", n / 100))
                for n in range(plan.clients)
            ]
            await _saturated(trial, load, plan, say)
            await _until_counted(load, trial.alone[-1].end)
            for client in clients:
                client.cancel()
    finally:
        await load.close()
    trial.seconds = time.monotonic() - started
    return trial


async def _warm_up(load: Load) -> None:
    for tier in ("default", "priority"):
        await asyncio.gather(*(load.ask(tier, "warm up") for _ in range(_WARM_UP_REQUESTS)))
    if failed := [answer.error for answer in load.answers if answer.error]:
        raise RuntimeError(f"the endpoint does not answer: {failed[0]}")


async def _idle(load: Load, plan: Plan) -> None:
    for _ in range(plan.idle_requests):
        await load.ask("priority", "idle")
        await asyncio.sleep(_IDLE_PAUSE_S)


async def _saturated(trial: Trial, load: Load, plan: Plan, say: Say) -> None:
    say(f"{trial.endpoint}: {plan.clients} default clients, filling up")
    await _until_steady(load, plan)
    say(f"{trial.endpoint}: default alone, {plan.alone_s:.0f} s")
    trial.alone.append(await _measure(trial, "alone", asyncio.sleep(plan.alone_s)))
    trial.rate = plan.rate or plan.share * _rate(trial.answers, trial.alone[0])
    say(
        f"{trial.endpoint}: priority as well, {trial.rate:.2f} a second for {plan.together_s:.0f} s"
    )
    trial.together = await _measure(trial, "together", _arrivals(load, plan, trial.rate))
    say(f"{trial.endpoint}: default alone again, {plan.alone_s:.0f} s")
    trial.alone.append(await _measure(trial, "alone again", asyncio.sleep(plan.alone_s)))
    if load.spent:
        say(f"{trial.endpoint}: the limit of {plan.most} requests cut this run short")


async def _until_steady(load: Load, plan: Plan) -> None:
    """Wait until everybody has been answered once, on average: the queue is then as it stays."""
    before, deadline = len(load.answers), time.monotonic() + _LONGEST_FILLING_S
    while len(load.answers) < before + plan.clients and time.monotonic() < deadline:
        await asyncio.sleep(0.1)


async def _until_counted(load: Load, moment: float) -> None:
    """Wait for the answers that were on their way at a moment: their tokens count up to then."""
    while any(answer.first and answer.first < moment for answer in load.open):
        await asyncio.sleep(0.05)


async def _arrivals(load: Load, plan: Plan, rate: float) -> None:
    """Make priority requests when they are due, and wait for the last answer."""
    arrivals = regular_arrivals if plan.regular else poisson_arrivals
    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for due in arrivals(rate, plan.together_s):
            await asyncio.sleep(begun + due - time.monotonic())
            if load.spent:
                break
            group.create_task(load.ask("priority", "together"))
        await asyncio.sleep(begun + plan.together_s - time.monotonic())


async def _measure(trial: Trial, name: str, what: Awaitable[object]) -> Window:
    window, trial.efforts[name] = await watched(what, trial.processes)
    return window


async def watched(what: Awaitable[object], processes: Processes) -> tuple[Window, Effort]:
    """Await something; return how long it took, and what generator and server used meanwhile."""
    with _no_collection():
        effort = Effort(processes)
        start = time.monotonic()
        effort.begin()
        await what
        effort.end()
    return Window(start, time.monotonic()), effort


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from stopping the generator while it measures."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _rate(answers: Iterable[Answer], window: Window) -> float:
    return sum(window.has(answer.ended) for answer in answers) / window.seconds
