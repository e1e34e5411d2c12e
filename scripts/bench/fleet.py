"""A discrete-event simulation of one model whose number of replicas somebody decides.

What is simulated: requests of three tiers come, wait in one queue and run in slots of replicas that
take time to start and end only once their requests have. The queue's rules are those of
`app.config.queue`: order by tier, headroom, length by tier with displacement, longest waits. Left
out: tenants, affinity, credits of several ingresses and the starvation guard, none of which a
policy sees. Everything random comes from the trace's seed, and is the same for every policy.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from app.scaling.report import PoolReport, ScalingReport, TierReport

_TIERS = tuple(Tier)
_P, _D, _F = 0, 1, 2
Request = tuple[float, int, float]
"""When it comes, the rank of its tier, and how long it keeps a slot."""


@dataclass(frozen=True)
class View:
    """What a policy may see: the time, targets, how many replicas are ready, and the demand."""

    now: float
    target: int
    ready: int
    total: int
    report: ScalingReport


class Policy(Protocol):
    """Decides how many replicas there are to be."""

    def decide(self, view: View) -> int:
        """Return the target from now on."""
        ...


@dataclass(frozen=True)
class Fleet:
    """What replicas are like.

    Attributes:
        slots: requests that each runs at once.
        start_s: from the decision until it serves.
        initial: how many there are at first.
        most: how many there may be; at least one.
        control_s: how often a policy is asked.
        prefill_s: from a slot to the first token.
    """

    slots: int
    start_s: float
    initial: int
    most: int
    control_s: float
    prefill_s: float = 0.2


@dataclass
class Outcome:
    """What a run came to.

    ``waits`` are the seconds in the queue of those who were served, by the rank of their tier, and
    ``shed`` those who were turned away. ``targets`` are times and targets for the plot.
    """

    waits: list[list[float]] = field(default_factory=lambda: [[], [], []])
    shed: list[int] = field(default_factory=lambda: [0, 0, 0])
    replica_s: float = 0.0
    busy_s: float = 0.0
    history: list[tuple[float, int, int]] = field(default_factory=list)

    def quantile(self, rank: int, quantile: float) -> float:
        """Return a quantile of the waits of one tier."""
        waits = sorted(self.waits[rank])
        return waits[min(len(waits) - 1, int(quantile * len(waits)))] if waits else math.nan


@dataclass(eq=False, slots=True)
class _Replica:
    running: int = 0
    ready: bool = False
    leaves: bool = False


class Simulation:
    """One run of one policy over one trace."""

    def __init__(self, fleet: Fleet, policy: Policy, queue: QueueSettings) -> None:
        self._fleet = fleet
        self._policy = policy
        self._settings = queue
        self._now = 0.0
        self._events: list[tuple[float, int, int, Any]] = []
        self._order = count()
        self._replicas = [_Replica(ready=True) for _ in range(fleet.initial)]
        self._starting: deque[_Replica] = deque()
        self._free: list[_Replica] = []
        for replica in self._replicas:
            self._free += [replica] * fleet.slots
        self._lanes: list[deque[Request]] = [deque(), deque(), deque()]
        self._longest_s = [queue.of(tier).max_wait_s for tier in _TIERS]
        self._counts = [[0.0, 0.0, 0.0] for _ in _TIERS]  # arrived, finished, served_s
        self._running = [0, 0, 0]
        self._provisioned = fleet.initial
        self._outcome = Outcome()
        self._resize()

    def run(self, requests: Iterator[Request], seconds: float) -> Outcome:
        """Simulate so many seconds."""
        events, coming = self._events, next(requests, None)
        self._push(self._fleet.control_s, 2, None)
        last = 0.0
        while True:
            at = events[0][0] if events else math.inf
            if coming is not None and coming[0] <= at:
                if coming[0] > seconds:
                    break
                self._outcome.replica_s += self._provisioned * (coming[0] - last)
                self._now = last = coming[0]
                self._arrive(coming)
                coming = next(requests, None)
                continue
            if at > seconds:
                break
            self._outcome.replica_s += self._provisioned * (at - last)
            self._now = last = at
            _, _, kind, what = heapq.heappop(events)
            (self._finish, self._ready, self._control)[kind](what)
        self._outcome.replica_s += self._provisioned * (seconds - last)
        return self._outcome

    def _push(self, at: float, kind: int, what: Any) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, what))

    # Requests.

    def _arrive(self, request: Request) -> None:
        rank = request[1]
        self._counts[rank][0] += 1
        if len(self._free) > (0 if rank == _P else self._headroom):
            self._place(request)
            return
        lanes = self._lanes
        if sum(map(len, lanes)) >= self._bounds[rank]:
            for lower in (_F, _D):
                if lower > rank and len(lanes[lower]) > self._reserved[lower]:
                    lanes[lower].pop()
                    self._outcome.shed[lower] += 1
                    break
            else:
                if len(lanes[rank]) >= self._reserved[rank]:
                    self._outcome.shed[rank] += 1
                    return
        lanes[rank].append(request)

    def _place(self, request: Request) -> None:
        at, rank, service_s = request
        replica = self._free.pop()
        replica.running += 1
        self._running[rank] += 1
        self._outcome.waits[rank].append(self._now - at)
        self._push(self._now + service_s, 0, (replica, rank, service_s))

    def _finish(self, what: tuple[_Replica, int, float]) -> None:
        replica, rank, service_s = what
        replica.running -= 1
        self._running[rank] -= 1
        self._counts[rank][1] += 1
        self._counts[rank][2] += service_s
        self._outcome.busy_s += service_s
        if not replica.leaves:
            self._free.append(replica)
            self._dispatch()
        elif not replica.running:
            self._provisioned -= 1

    def _dispatch(self) -> None:
        lanes = self._lanes
        while lanes[_P] and self._free:
            self._place(lanes[_P].popleft())
        for rank in (_D, _F):
            while lanes[rank] and len(self._free) > self._headroom:
                self._place(lanes[rank].popleft())

    def _expire(self) -> None:
        for rank, lane in enumerate(self._lanes):
            while lane and self._now - lane[0][0] >= self._longest_s[rank]:
                lane.popleft()
                self._outcome.shed[rank] += 1

    # Replicas.

    def _control(self, _: object) -> None:
        self._push(self._now + self._fleet.control_s, 2, None)
        self._expire()
        target = len(self._replicas) + len(self._starting)
        wanted = self._policy.decide(
            View(self._now, target, len(self._replicas), self._present(), self._report())
        )
        wanted = min(max(wanted, 1), self._fleet.most)
        for _ in range(wanted - target):
            replica = _Replica()
            self._starting.append(replica)
            self._provisioned += 1
            self._push(self._now + self._fleet.start_s, 1, replica)
        for _ in range(target - wanted):
            self._stop()
        if wanted < target:
            self._free = [replica for replica in self._free if not replica.leaves]
            self._resize()
        self._outcome.history.append((self._now, self._provisioned, self._present()))

    def _ready(self, replica: _Replica) -> None:
        if replica.leaves:
            return
        self._starting.remove(replica)
        replica.ready = True
        self._replicas.append(replica)
        self._free += [replica] * self._fleet.slots
        self._resize()
        self._dispatch()

    def _stop(self) -> None:
        """Stop a replica that still starts, or else the one that has least to finish."""
        if self._starting:
            self._starting.pop().leaves = True
            self._provisioned -= 1
            return
        replica = min(self._replicas, key=lambda one: one.running)
        self._replicas.remove(replica)
        replica.leaves = True
        if not replica.running:
            self._provisioned -= 1

    def _resize(self) -> None:
        slots = len(self._replicas) * self._fleet.slots
        self._headroom = self._settings.headroom_of(slots)
        bounds = self._settings.bounds(slots=slots, ingresses=1)
        reserved = self._settings.reserved(slots=slots, ingresses=1)
        self._bounds = [bounds[tier] for tier in _TIERS]
        self._reserved = [reserved[tier] for tier in _TIERS]

    # What a policy sees.

    def _present(self) -> int:
        return sum(self._running) + sum(map(len, self._lanes))

    def _report(self) -> ScalingReport:
        tiers = {
            tier: TierReport(
                len(lane), self._running[rank], self._now - lane[0][0] if lane else 0.0,
                *self._counts[rank],
            )
            for rank, (tier, lane) in enumerate(zip(_TIERS, self._lanes, strict=True))
        }  # fmt: skip
        fleet = self._fleet
        pool = PoolReport(fleet.slots, len(self._replicas), start_s=fleet.start_s)
        return ScalingReport(tiers, {"pool": pool}, self._settings.headroom_share(preempts=False))
