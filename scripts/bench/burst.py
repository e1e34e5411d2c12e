"""Bursts of priority requests into an engine that lower tiers fill, at several endpoints by turns.

    bursts on the idle engine │ filling up │ alone │ bursts │ alone again

A turn is all of this at one endpoint. Several rounds of turns, each in the other direction, spread
drift of the machine over all endpoints. *Alone again* lasts until every answer that a burst met has
ended, so that each can be checked for being whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from scripts.bench.effort import Processes
from scripts.bench.load import Answer, Endpoint, Load, Workload
from scripts.bench.progress import steps
from scripts.bench.trial import Say, Window, watched

_LONGEST_FILLING_S = 120.0
_LONGEST_REST_S = 180.0
_PAUSE_S = 0.2
"""Between two bursts at least, and after a turn, for the engine to drop what was aborted."""
_PREEMPTIONS = "vllm:num_preemptions"


@dataclass(frozen=True, slots=True)
class BurstPlan:
    """How much of everything.

    Attributes:
        clients: default-tier clients in a closed loop.
        flex_clients: flex clients in a closed loop.
        size: priority requests at once.
        slots: how many requests the engine runs at once.
        tokens: length of their answers.
        idle_bursts: bursts in a turn while nothing else runs.
        bursts: bursts in a turn while the other clients saturate the engine.
        every_s: seconds from the start of one of those to the next; more if a burst lasts longer.
        alone_s: how long the other clients are measured alone, before the bursts and again after.
        rounds: turns of each endpoint.
        most: requests to an endpoint, at most.
    """

    clients: int
    flex_clients: int
    size: int
    slots: int
    tokens: int
    idle_bursts: int
    bursts: int
    every_s: float
    alone_s: float
    rounds: int
    most: int


@dataclass(frozen=True, slots=True)
class Contender:
    """An endpoint, and the engine behind it.

    Attributes:
        endpoint: where the requests go.
        engine_url: the engine's own server, for its metrics; ``None``: unknown.
        engine_key: the key that it requires.
    """

    endpoint: Endpoint
    engine_url: str | None = None
    engine_key: str = ""


@dataclass(slots=True)
class BurstTrial:
    """What was measured at one endpoint.

    Attributes:
        endpoint: its name.
        answers: every request that ended.
        unfinished: requests that were running when a turn ended, and were aborted.
        idle: the windows of the bursts on the idle engine.
        alone: the windows in which no priority came.
        bursts: the windows of the bursts while the engine was saturated.
        starts: when each of those bursts was sent.
        share: how much of the engine a burst takes, by its slots.
        preemptions: how often the engine suspended a request meanwhile; ``None``: unknown.
        lag_s: how late the generator's event loop was meanwhile, p99, in the worst turn.
    """

    endpoint: str
    answers: list[Answer] = field(default_factory=list)
    unfinished: list[Answer] = field(default_factory=list)
    idle: list[Window] = field(default_factory=list)
    alone: list[Window] = field(default_factory=list)
    bursts: list[Window] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    share: float = 1.0
    preemptions: float | None = None
    lag_s: float = 0.0


async def run_bursts(
    contenders: Sequence[Contender],
    workload: Workload,
    plan: BurstPlan,
    say: Say,
    processes: Processes = dict,
    after_turn: Callable[[list[BurstTrial]], object] = lambda trials: None,
) -> list[BurstTrial]:
    """Measure every endpoint in turn, round by round.

    ``after_turn`` gets what was measured so far, so that a run that is cut short is not lost.
    """
    turns = [_Turns(one, workload, plan, say, processes) for one in contenders]
    try:
        for turn in turns:
            await turn.warm_up()
        order = [
            turn for number in range(plan.rounds) for turn in turns[:: -1 if number % 2 else 1]
        ]
        for turn in steps(order, "bursts"):
            await turn.take()
            after_turn([turn.trial for turn in turns if turn.trial.bursts])
    finally:
        for turn in turns:
            await turn.load.close()
    return [turn.trial for turn in turns]


class _Turns:
    """The turns of one endpoint."""

    def __init__(
        self,
        contender: Contender,
        workload: Workload,
        plan: BurstPlan,
        say: Say,
        processes: Processes,
    ) -> None:
        self.load = Load(contender.endpoint, workload, most=plan.most)
        share = min(1.0, plan.size / plan.slots)
        self.trial = BurstTrial(contender.endpoint.name, self.load.answers, share=share)
        self._contender = contender
        self._plan = plan
        self._say = say
        self._processes = processes

    async def warm_up(self) -> None:
        """Have one burst answered.

        Raises:
            RuntimeError: a request failed.
        """
        await self._burst()
        if failed := [answer.error for answer in self.load.answers if answer.error]:
            raise RuntimeError(f"{self.trial.endpoint} does not answer: {failed[0]}")

    async def take(self) -> None:
        """Take one turn."""
        plan, trial, name = self._plan, self.trial, self.trial.endpoint
        self._say(f"{name}: {plan.idle_bursts} bursts of {plan.size} on the idle engine")
        trial.idle.append(await self._watch(self._bursts(plan.idle_bursts, 0.0)))
        async with asyncio.TaskGroup() as group:
            tiers = ["default"] * plan.clients + ["flex"] * plan.flex_clients
            clients = [
                group.create_task(self.load.ask_for_ever(tier, f"{name} {tier}", number / 100))
                for number, tier in enumerate(tiers)
            ]
            await self._saturated()
            self._keep_unfinished()
            for client in clients:
                client.cancel()
        await asyncio.sleep(_PAUSE_S)

    async def _saturated(self) -> None:
        plan, trial, name = self._plan, self.trial, self.trial.endpoint
        self._say(f"{name}: {plan.clients} default and {plan.flex_clients} flex clients fill it")
        await self._until_full()
        trial.alone.append(await self._watch(asyncio.sleep(plan.alone_s)))
        self._say(f"{name}: {plan.bursts} bursts of {plan.size}")
        before = await preemptions(self._contender)
        trial.bursts.append(await self._watch(self._bursts(plan.bursts, plan.every_s, seen=True)))
        after = await preemptions(self._contender)
        if before is not None and after is not None:
            trial.preemptions = (trial.preemptions or 0.0) + after - before
        self._say(f"{name}: no bursts, until every answer that one met has ended")
        trial.alone.append(await self._watch(self._rest(trial.bursts[-1].end)))
        if self.load.spent:
            self._say(f"{name}: the limit of {plan.most} requests cut this run short")

    async def _bursts(self, count: int, every_s: float, *, seen: bool = False) -> None:
        for _ in range(count):
            start = time.monotonic()
            if seen:
                self.trial.starts.append(start)
            await self._burst()
            await asyncio.sleep(max(_PAUSE_S, start + every_s - time.monotonic()))

    async def _burst(self) -> None:
        label, tokens = f"{self.trial.endpoint} burst", self._plan.tokens
        one = (self.load.ask("priority", label, tokens) for _ in range(self._plan.size))
        await asyncio.gather(*one)

    async def _until_full(self) -> None:
        """Wait until as many answers have ended as the engine runs at once."""
        before, deadline = len(self.load.answers), time.monotonic() + _LONGEST_FILLING_S
        while len(self.load.answers) < before + self._plan.size and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    async def _rest(self, moment: float) -> None:
        """Wait for the answers that were running at a moment, but as long as is measured alone."""
        deadline = time.monotonic() + _LONGEST_REST_S
        await asyncio.sleep(self._plan.alone_s)
        while time.monotonic() < deadline and any(
            answer.first and answer.first < moment for answer in self.load.open
        ):
            await asyncio.sleep(0.05)

    def _keep_unfinished(self) -> None:
        for answer in self.load.open:
            answer.ended, answer.error = time.monotonic(), "aborted"
        self.trial.unfinished.extend(self.load.open)

    async def _watch(self, what: Awaitable[object]) -> Window:
        window, effort = await watched(what, self._processes)
        self.trial.lag_s = max(self.trial.lag_s, effort.lag_s)
        return window


async def preemptions(contender: Contender) -> float | None:
    """Return how often the engine has suspended a request; ``None`` where it does not say."""
    if contender.engine_url is None:
        return None
    headers = {"authorization": f"Bearer {contender.engine_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{contender.engine_url}/metrics", allow_redirects=False) as response,
    ):
        return counted(await response.text()) if response.status == 200 else None


def counted(metrics: str) -> float | None:
    """Return the sum of vLLM's preemption counters; ``None`` without any."""
    lines = [line for line in metrics.splitlines() if line.startswith(_PREEMPTIONS)]
    # Not the time at which a counter was made, which clients of Prometheus add.
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if "_created" not in line]
    return sum(values) if values else None
