"""A discrete-event simulation of ingresses, a Model and engines, on the code that serves.

`app.flow.scheduler`, `app.flow.credits` and `app.flow.allocation.allocator` run as they are; the
clock, the network and the engines are simulated. Everything random comes from a scenario's seed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

from app.config.queue import QueueSettings
from app.contracts.credits import Demand, Grant
from app.core.tiers import PriorityMode, Tier
from app.flow.allocation.allocator import LOOK_AFTER_S, Capacity, CreditAllocator
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import Scheduler
from app.flow.slots import Offer

ROUTE = "chat/completions"
TICK_S = 1.0
SERVICE_SIGMA = 0.8
TOKENS_PER_S = 50
# Bursts last 2 s and come every 10 s; in them three times the mean rate, between them half of it.
BURST_S, CALM_S = 2.0, 8.0
BURST_RATE, CALM_RATE = 3.0, 0.5


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        ingresses: how many ingresses share the replicas.
        replicas: how many engine replicas there are.
        load: the work offered, as a share of what all slots can do.
        bursty: whether requests come in bursts.
        seconds: how long they come; the first tenth is not counted.
        priority, flex: which parts of the requests are of these tiers.
        network_s: mean time of a message between an ingress and the Model.
        wake: whether the Model tells ingresses when they ought to renew.
        slots: requests that a replica runs at once.
        service_s: mean time that a request takes, of a log-normal distribution.
        tenants: how many there are; the n-th sends 1/n as much as the first.
        seed: of everything random.
    """

    ingresses: int
    replicas: int
    load: float
    bursty: bool
    seconds: float
    priority: float = 0.1
    flex: float = 0.2
    network_s: float = 0.005
    wake: bool = True
    slots: int = 8
    service_s: float = 10.0
    tenants: int = 20
    seed: int = 1

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        arrivals = "bursts" if self.bursty else "Poisson"
        return f"{self.ingresses} x {self.replicas}, {self.load:.0%}, {arrivals}"

    @property
    def warm_up_s(self) -> float:
        """What is not counted."""
        return self.seconds / 10


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as its client sends it."""

    at: float
    tier: Tier
    tenant: str
    ingress: int
    service_s: float


@dataclass
class Outcome:
    """What a run came to: waits by tier, how many were shed, how busy the slots were.

    ``most_queued`` is how many requests waited inside one engine at most, ``renewals`` how many
    each ingress made per second.
    """

    waits: dict[Tier, list[float]] = field(default_factory=lambda: {t: [] for t in Tier})
    shed: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    most_queued: int = 0
    busy: float = 0.0
    renewals: float = 0.0

    def wait(self, tier: Tier, quantile: float) -> float:
        """Return a quantile of the waits of those who were served, in seconds."""
        waits = sorted(self.waits[tier])
        return waits[min(len(waits) - 1, int(quantile * len(waits)))] if waits else math.nan

    def shed_share(self, tier: Tier) -> float:
        """Return which part of the requests were shed."""
        total = len(self.waits[tier]) + self.shed[tier]
        return self.shed[tier] / total if total else 0.0


def arrivals(scenario: Scenario) -> Iterator[Arrival]:
    """Yield the requests of a scenario, always the same ones."""
    random = Random(scenario.seed)
    rate = scenario.load * scenario.replicas * scenario.slots / scenario.service_s
    mu = math.log(scenario.service_s) - SERVICE_SIGMA**2 / 2
    weights = [1 / (rank + 1) for rank in range(scenario.tenants)]
    tenants = [f"tenant-{rank}" for rank in range(scenario.tenants)]
    shares = (scenario.priority, 1 - scenario.priority - scenario.flex, scenario.flex)
    rates = _rates(scenario, random)
    now = 0.0
    factor, until = next(rates)
    while now < scenario.seconds:
        pause = random.expovariate(rate * factor)
        if now + pause > until:
            now = until
            factor, until = next(rates)
            continue
        now += pause
        yield Arrival(
            now,
            random.choices(tuple(Tier), shares)[0],
            random.choices(tenants, weights)[0],
            random.randrange(scenario.ingresses),
            random.lognormvariate(mu, SERVICE_SIGMA),
        )


def _rates(scenario: Scenario, random: Random) -> Iterator[tuple[float, float]]:
    """Yield factors of the mean rate, and until when each holds."""
    if not scenario.bursty:
        yield 1.0, math.inf
    now = 0.0
    while True:
        for factor, mean_s in ((CALM_RATE, CALM_S), (BURST_RATE, BURST_S)):
            now += random.expovariate(1 / mean_s)
            yield factor, now


@dataclass(slots=True)
class Engine:
    """An engine replica: so many requests run, others wait inside in the order of their tier."""

    slots: int
    running: int = 0
    queue: list[tuple[int, int, int, QueuedRequest]] = field(default_factory=list)


class Simulation:
    """One run: ingresses, a Model, engines, and a clock."""

    def __init__(self, scenario: Scenario, settings: QueueSettings, *, ideal: bool) -> None:
        self._scenario = scenario
        self._outcome = Outcome()
        self._now = 0.0
        self._random = Random(scenario.seed + 1)
        self._network_s = 0.0 if ideal else scenario.network_s
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()
        self._service_s: dict[QueuedRequest, float] = {}
        self._busy_s = 0.0
        names = [f"replica-{number}" for number in range(scenario.replicas)]
        self._engines = {name: Engine(scenario.slots) for name in names}
        self._allocator = CreditAllocator("model", settings, -60.0)
        self._allocator.set_replicas(Capacity(name, "pool", scenario.slots, True) for name in names)
        offers = [Offer(name, "pool", scenario.slots, frozenset({ROUTE})) for name in names]
        ingresses = 1 if ideal else scenario.ingresses
        self._gates = [Scheduler(str(index), settings) for index in range(ingresses)]
        self._renewal_at = [math.inf] * ingresses
        for scheduler in self._gates:
            scheduler.set_replicas(offers, PriorityMode.AUTO, 0.0)
        for _ in range(8):  # All have their credits when the first request comes.
            for scheduler in self._gates:
                scheduler.receive(self._allocator.renew(scheduler.demand(0.0), 0.0), 0.0)
        for index in range(ingresses):
            self._plan_renewal(index)

    def run(self) -> Outcome:
        """Simulate all of it, and return what came of it."""
        scenario, outcome = self._scenario, self._outcome
        self._expect(arrivals(scenario))
        self._at(TICK_S, self._tick)
        while self._events and self._events[0][0] <= scenario.seconds:
            self._now, _, act, what = heapq.heappop(self._events)
            act(*what)
        counted_s = scenario.seconds - scenario.warm_up_s
        outcome.busy = self._busy_s / (scenario.replicas * scenario.slots * counted_s)
        outcome.renewals /= scenario.seconds * len(self._gates)
        return outcome

    def _at(self, when: float, act: Callable[..., None], *what: object) -> None:
        heapq.heappush(self._events, (when, next(self._order), act, what))

    def _send(self, act: Callable[..., None], *what: object) -> None:
        latency = self._random.expovariate(1 / self._network_s) if self._network_s else 0.0
        self._at(self._now + latency, act, *what)

    @property
    def _counts(self) -> bool:
        return self._now >= self._scenario.warm_up_s

    # Requests.

    def _expect(self, coming: Iterator[Arrival]) -> None:
        if (arrival := next(coming, None)) is not None:
            self._at(arrival.at, self._arrive, arrival, coming)

    def _arrive(self, arrival: Arrival, coming: Iterator[Arrival]) -> None:
        self._expect(coming)
        index = arrival.ingress % len(self._gates)
        tokens = int(arrival.service_s * TOKENS_PER_S) + 1
        request = QueuedRequest(arrival.tier, arrival.tenant, tokens, ROUTE)
        self._service_s[request] = arrival.service_s
        called = self._gates[index].arrive(request, self._now)
        if request.state is not RequestState.WAITING:
            called = [*called, request]
        self._call(index, called)

    def _call(self, index: int, called: list[QueuedRequest]) -> None:
        for request in called:
            if request.state is RequestState.PLACED:
                self._submit(index, request)
                continue
            del self._service_s[request]
            if self._counts:
                self._outcome.shed[request.tier] += 1
        self._plan_renewal(index)

    def _submit(self, index: int, request: QueuedRequest) -> None:
        engine = self._engines[request.replica_id]
        if engine.running < engine.slots:
            self._begin(index, request, engine)
            return
        heapq.heappush(engine.queue, (request.tier.rank, next(self._order), index, request))
        self._outcome.most_queued = max(self._outcome.most_queued, len(engine.queue))

    def _begin(self, index: int, request: QueuedRequest, engine: Engine) -> None:
        engine.running += 1
        ends = self._now + self._service_s.pop(request)
        if self._counts:
            self._outcome.waits[request.tier].append(self._now - request.arrived)
        counted_from = max(self._now, self._scenario.warm_up_s)
        self._busy_s += max(0.0, min(ends, self._scenario.seconds) - counted_from)
        self._at(ends, self._finish, index, request, engine)

    def _finish(self, index: int, request: QueuedRequest, engine: Engine) -> None:
        engine.running -= 1
        if engine.queue:
            _, _, owner, waiting = heapq.heappop(engine.queue)
            self._begin(owner, waiting, engine)
        self._call(index, self._gates[index].end(request, self._now))

    def _tick(self) -> None:
        for index, scheduler in enumerate(self._gates):
            self._call(index, scheduler.tick(self._now))
        self._at(self._now + TICK_S, self._tick)

    # Credits. An ingress has one renewal under way at most; meanwhile nothing is planned.

    def _plan_renewal(self, index: int) -> None:
        due = max(self._now, self._gates[index].renewal_at())
        if due < self._renewal_at[index]:
            self._renewal_at[index] = due
            self._at(due, self._renew, index, due)

    def _renew(self, index: int, due: float) -> None:
        if self._renewal_at[index] == due:
            self._renewal_at[index] = -math.inf
            self._outcome.renewals += 1
            self._send(self._ask, index, self._gates[index].demand(self._now))

    def _ask(self, index: int, demand: Demand) -> None:
        self._send(self._receive, index, self._allocator.renew(demand, self._now))
        if self._scenario.wake:
            self._look()
            self._at(self._now + LOOK_AFTER_S, self._look)

    def _look(self) -> None:
        for name in self._allocator.wakeups(self._now):
            self._send(self._nudge, int(name))

    def _nudge(self, index: int) -> None:
        if self._renewal_at[index] > self._now:
            self._renewal_at[index] = self._now
            self._renew(index, self._now)

    def _receive(self, index: int, grant: Grant) -> None:
        self._renewal_at[index] = math.inf
        self._call(index, self._gates[index].receive(grant, self._now))
