"""A simulation of replicas that batch continuously, for traces of any size.

It replaces fixed service times (``scripts.bench.fleet``) by an engine model: the more a replica
runs, the slower each request gets. All replicas are assumed equally busy, as least-loaded routing
keeps them. A cohort is one request, or, for traffic too large to follow request by request, many
equal ones that arrive together (its weight); cohorts are split where only a part finds room.

Order of service is Frontline's on engines that preempt: a tier has room while fewer than the slots
are taken by itself or better tiers, and takes slots from lower tiers, the newest first. A suspended
request goes to the head of its queue, and is prefilled again, with what it had generated. Prompts
of priority are computed before those of others. Queue bounds are those of ``app.config.queue``.
Left out: the starvation guard, tenants, affinity, several ingresses and the engine's own queue.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from app.scaling.report import PoolReport, ScalingReport, TierReport
from scripts.bench.engine_model import EngineModel
from scripts.bench.fleet import Policy, View

_TIERS = tuple(Tier)
_P, _D, _F = 0, 1, 2
_EMPTY = 1e-9
_DRAIN_SERVICES = 2.0
"""A stopped replica is paid for until its last request ends: so many mean service times later."""

Arrival = tuple[float, int, float, float, float, float]
"""Time, rank of the tier, prompt tokens to compute, output tokens, context tokens, weight."""


@dataclass(frozen=True)
class Cluster:
    """What replicas are like, and how they are controlled.

    Attributes:
        engine: one replica.
        start_s: from the decision until it serves.
        initial: how many there are at first.
        most: how many there may be.
        control_s: how often the policy is asked.
        preempts: whether engines suspend running requests for better tiers.
    """

    engine: EngineModel
    start_s: float
    initial: int
    most: int
    control_s: float
    preempts: bool = True


@dataclass
class Served:
    """What a run came to; lists have one entry for each cohort, by the rank of its tier.

    Attributes:
        first: arrival, time to the first token (infinity if shed), that of an idle engine, weight.
        waits: arrival, time in the queue until it was placed first, weight.
        ended: arrival, time until the answer's end (infinity if shed), weight.
        tokens: prompt and output tokens of what was served to its end.
        history: time, replicas paid for, target.
        preempted: how many requests were suspended.
    """

    first: list[list[tuple[float, float, float, float]]] = field(
        default_factory=lambda: [[], [], []]
    )
    waits: list[list[tuple[float, float, float]]] = field(default_factory=lambda: [[], [], []])
    ended: list[list[tuple[float, float, float]]] = field(default_factory=lambda: [[], [], []])
    tokens: float = 0.0
    history: list[tuple[float, float, int]] = field(default_factory=list)
    preempted: float = 0.0


class _Cohort:
    """Equal requests with the same state."""

    __slots__ = (
        "arrived", "context", "done", "idle_s", "original", "output", "placed", "prompt", "rank",
        "stage", "started", "threshold", "weight",
    )  # fmt: skip

    def __init__(
        self, arrived: float, rank: int, prompt: float, output: float, context: float, weight: float
    ) -> None:
        self.arrived, self.rank, self.weight = arrived, rank, weight
        self.prompt, self.output, self.context = prompt, output, context
        self.original = prompt + output
        self.idle_s = 0.0
        self.started = False  # its first token has come
        self.placed = -1.0
        self.stage = 0
        self.threshold = 0.0
        self.done = False  # this entry of the heaps counts no more

    def split(self, weight: float) -> _Cohort:
        """Take a part of the weight away into a cohort of its own."""
        part = _Cohort(self.arrived, self.rank, self.prompt, self.output, self.context, weight)
        part.original, part.idle_s, part.started = self.original, self.idle_s, self.started
        part.placed, part.stage, part.threshold = self.placed, self.stage, self.threshold
        self.weight -= weight
        return part

    @property
    def cached(self) -> float:
        """Tokens that it has in the KV cache, on average while it runs."""
        return self.context + self.output / 2


class Simulation:
    """One run of one policy over one trace."""

    def __init__(self, cluster: Cluster, policy: Policy, queue: QueueSettings) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._policy = policy
        self._queue = queue
        self._now = 0.0
        self._order = count()
        self._ready = cluster.initial
        self._starting: deque[float] = deque()
        self._draining: deque[tuple[float, float, float]] = deque()  # from, until, requests
        self._drained = 0.0
        self._lanes: list[deque[_Cohort]] = [deque(), deque(), deque()]
        self._waiting = [0.0, 0.0, 0.0]
        self._longest_s = [queue.of(tier).max_wait_s for tier in _TIERS]
        # Requests are in prefill (of priority, of others) or decode. Each stage has a clock: how
        # much of it a request that was there all the time would have had.
        self._stages: list[list[tuple[float, int, _Cohort]]] = [[], [], []]
        self._clocks = [0.0, 0.0, 0.0]
        self._inside = [0.0, 0.0, 0.0]
        self._rates = [0.0, 0.0, 0.0]
        self._cached = 0.0
        self._running = [0.0, 0.0, 0.0]
        self._placed: list[list[_Cohort]] = [[], [], []]
        self._counts = [[0.0, 0.0, 0.0] for _ in _TIERS]
        self._served = Served()
        self._resize()

    def run(self, arrivals: Iterator[Arrival], seconds: float) -> Served:
        """Simulate so many seconds."""
        coming = next(arrivals, None)
        control = self._cluster.control_s
        self._set_rates()
        while True:
            stage, at = self._next_event()
            until = min(control, self._starting[0] if self._starting else math.inf)
            if coming is not None and coming[0] <= until and coming[0] <= at:
                if coming[0] > seconds:
                    break
                self._advance(coming[0])
                self._arrive(_Cohort(*coming))
                coming = next(arrivals, None)
            elif at <= until:
                if at > seconds:
                    break
                self._advance(at)
                self._pass_stage(stage)
            elif until > seconds:
                break
            else:
                self._advance(until)
                if self._starting and self._starting[0] <= until:
                    self._starting.popleft()
                    self._ready += 1
                    self._resize()
                    self._dispatch()
                else:
                    control += self._cluster.control_s
                    self._control()
            self._set_rates()
        return self._served

    # Time.

    def _next_event(self) -> tuple[int, float]:
        stage, at = -1, math.inf
        for index, heap in enumerate(self._stages):
            while heap and heap[0][2].done:
                heapq.heappop(heap)
            if heap and self._rates[index] > 0:
                left = max(0.0, heap[0][0] - self._clocks[index])
                due = self._now + left / self._rates[index]
                if due < at:
                    stage, at = index, due
        return stage, at

    def _advance(self, to: float) -> None:
        passed = to - self._now
        clocks, rates = self._clocks, self._rates
        clocks[0] += passed * rates[0]
        clocks[1] += passed * rates[1]
        clocks[2] += passed * rates[2]
        self._now = to

    def _set_rates(self) -> None:
        """Compute how fast each stage goes on, from what runs now."""
        replicas = self._ready + len(self._draining)
        if replicas <= 0:
            self._rates = [0.0, 0.0, 0.0]
            return
        engine = self._engine
        best, others, decoding = self._inside
        first = min(replicas, best)
        second = min(replicas - first, others)
        decode_s = engine.decode_s(decoding / replicas, max(0.0, self._cached) / replicas)
        mixed_s = decode_s + engine.token_s * engine.chunk
        prefill = engine.chunk / mixed_s
        mixed = min(1.0, (first + second) / replicas)
        self._rates = [
            prefill * first / best if best > _EMPTY else prefill,
            prefill * second / others if others > _EMPTY else prefill,
            (1 - mixed) / decode_s + mixed / mixed_s,
        ]

    # Requests.

    def _arrive(self, cohort: _Cohort) -> None:
        rank = cohort.rank
        cohort.idle_s = self._engine.prefill_s(cohort.prompt)
        self._counts[rank][0] += cohort.weight
        if not self._waiting[rank]:
            rest = self._place_part(cohort)
            if rest is None:
                return
            cohort = rest
        self._make_room(cohort)
        if cohort.weight > _EMPTY:
            self._lanes[rank].append(cohort)
            self._waiting[rank] += cohort.weight
            self._dispatch()

    def _make_room(self, cohort: _Cohort) -> None:
        """Shed what a full queue has no room for: the newest of lower tiers, else the newcomer."""
        rank = cohort.rank
        over = sum(self._waiting) + cohort.weight - self._bounds[rank]
        for lower in (_F, _D):
            lane = self._lanes[lower]
            while over > _EMPTY and lower > rank and lane and lane[-1].placed < 0:
                spare = min(over, self._waiting[lower] - self._reserved[lower], lane[-1].weight)
                if spare <= _EMPTY:
                    break
                self._shed(lane[-1].split(spare))
                self._waiting[lower] -= spare
                if lane[-1].weight <= _EMPTY:
                    lane.pop()
                over -= spare
        over = min(over, self._waiting[rank] + cohort.weight - self._reserved[rank], cohort.weight)
        if over > _EMPTY:
            self._shed(cohort.split(over))

    def _shed(self, cohort: _Cohort) -> None:
        self._served.first[cohort.rank].append(
            (cohort.arrived, math.inf, cohort.idle_s, cohort.weight)
        )
        self._served.ended[cohort.rank].append((cohort.arrived, math.inf, cohort.weight))

    def _room(self, rank: int) -> float:
        taken = self._running[: rank + 1] if self._cluster.preempts else self._running
        kept = 0 if rank == _P else self._headroom
        return self._slots - kept - max(0.0, sum(taken) - self._drained)

    def _place_part(self, cohort: _Cohort) -> _Cohort | None:
        """Place what has room, and return the rest, if any."""
        room = self._room(cohort.rank)
        if room <= _EMPTY:
            return cohort
        rest = None
        if room < cohort.weight - _EMPTY:
            if cohort.weight > self._large:
                rest, cohort = cohort, cohort.split(room)
            elif room < cohort.weight / 2:
                return cohort
        if self._cluster.preempts:
            self._take_slots(cohort.rank, cohort.weight)
        self._place(cohort)
        return rest

    def _take_slots(self, rank: int, weight: float) -> None:
        """Suspend lower tiers, the newest first, until so much is free."""
        over = weight + max(0.0, sum(self._running) - self._drained) - self._slots
        for lower in (_F, _D):
            placed = self._placed[lower]
            while over > _EMPTY and lower > rank and placed:
                victim = placed[-1]
                if victim.done:
                    placed.pop()
                    continue
                part = victim
                if victim.weight > max(over, self._large) + _EMPTY:
                    part = victim.split(over)
                else:
                    placed.pop()
                over -= part.weight
                self._suspend(part, part is victim)

    def _suspend(self, cohort: _Cohort, whole: bool) -> None:
        stage, rank = cohort.stage, cohort.rank
        left = max(0.0, cohort.threshold - self._clocks[stage])
        self._inside[stage] -= cohort.weight
        self._running[rank] -= cohort.weight
        self._cached -= cohort.weight * cohort.cached
        again = cohort
        if whole:
            cohort.done = True
            again = cohort.split(cohort.weight)
        if stage == 2:
            generated = max(0.0, again.output - left)
            again.context += generated
            again.prompt, again.output = again.context, left
        self._lanes[rank].appendleft(again)
        self._waiting[rank] += again.weight
        self._served.preempted += again.weight

    def _place(self, cohort: _Cohort) -> None:
        rank = cohort.rank
        if cohort.placed < 0:
            self._served.waits[rank].append(
                (cohort.arrived, self._now - cohort.arrived, cohort.weight)
            )
        cohort.placed = self._now
        stage = 0 if rank == _P else 1
        self._enter(stage, cohort, cohort.prompt)
        self._running[rank] += cohort.weight
        self._cached += cohort.weight * cohort.cached
        if rank != _P:
            self._placed[rank].append(cohort)

    def _enter(self, stage: int, cohort: _Cohort, work: float) -> None:
        cohort.stage, cohort.threshold = stage, self._clocks[stage] + work
        heapq.heappush(self._stages[stage], (cohort.threshold, next(self._order), cohort))
        self._inside[stage] += cohort.weight

    def _pass_stage(self, stage: int) -> None:
        _, _, cohort = heapq.heappop(self._stages[stage])
        self._clocks[stage] = max(self._clocks[stage], cohort.threshold)
        self._inside[stage] = max(0.0, self._inside[stage] - cohort.weight)
        if stage < 2:
            if not cohort.started:
                cohort.started = True
                self._served.first[cohort.rank].append(
                    (cohort.arrived, self._now - cohort.arrived, cohort.idle_s, cohort.weight)
                )
            self._enter(2, cohort, cohort.output)
            return
        self._finish(cohort)

    def _finish(self, cohort: _Cohort) -> None:
        rank, weight = cohort.rank, cohort.weight
        cohort.done = True
        self._running[rank] = max(0.0, self._running[rank] - weight)
        self._cached -= weight * cohort.cached
        counts = self._counts[rank]
        counts[1] += weight
        counts[2] += weight * (self._now - cohort.placed)
        self._served.ended[rank].append((cohort.arrived, self._now - cohort.arrived, weight))
        self._served.tokens += weight * cohort.original
        if len(self._placed[rank]) > 4096 and len(self._placed[rank]) % 1024 == 0:
            self._placed[rank] = [one for one in self._placed[rank] if not one.done]
        self._dispatch()

    def _dispatch(self) -> None:
        for rank in (_P, _D, _F):
            lane = self._lanes[rank]
            while lane:
                before = lane[0].weight
                rest = self._place_part(lane[0])
                if rest is None:
                    lane.popleft()
                    self._waiting[rank] -= before
                    continue
                self._waiting[rank] -= before - rest.weight
                break
            if not lane:
                self._waiting[rank] = 0.0

    def _expire(self) -> None:
        for rank, lane in enumerate(self._lanes):
            # Suspended requests, which stand in front, are never shed.
            kept = []
            while lane and (
                lane[0].placed >= 0 or self._now - lane[0].arrived >= self._longest_s[rank]
            ):
                cohort = lane.popleft()
                if cohort.placed >= 0:
                    kept.append(cohort)
                else:
                    self._waiting[rank] -= cohort.weight
                    self._shed(cohort)
            lane.extendleft(reversed(kept))

    # Replicas.

    def _control(self) -> None:
        self._expire()
        draining = self._draining
        while draining and draining[0][1] <= self._now:
            draining.popleft()
        self._drained = sum(
            requests * (until - self._now) / (until - since) for since, until, requests in draining
        )
        target = self._ready + len(self._starting)
        total = sum(self._running) + sum(self._waiting)
        view = View(self._now, target, self._ready, round(total), self._report())
        wanted = min(max(self._policy.decide(view), 1), self._cluster.most)
        for _ in range(wanted - target):
            self._starting.append(self._now + self._cluster.start_s)
        for _ in range(target - wanted):
            self._stop()
        if wanted < target:
            self._resize()
        self._dispatch()
        paid = self._ready + len(self._starting) + len(draining)
        self._served.history.append((self._now, paid, wanted))

    def _stop(self) -> None:
        """Stop a replica that still starts, else one that runs."""
        if self._starting:
            self._starting.pop()
            return
        each = max(0.0, sum(self._running) - self._drained) / self._ready
        finished = sum(counts[1] for counts in self._counts)
        mean_s = sum(counts[2] for counts in self._counts) / finished if finished else 0.0
        self._ready -= 1
        until = self._now + _DRAIN_SERVICES * mean_s
        if each and until > self._now:
            self._draining.append((self._now, until, each))
            self._drained += each

    def _resize(self) -> None:
        self._slots = self._ready * self._engine.slots
        # Smaller cohorts stay whole: split at every turn, they would become ever more and smaller.
        self._large = self._slots / 64 if self._slots > 64 else 1.0
        share = self._queue.headroom_share(preempts=self._cluster.preempts)
        self._headroom = math.ceil(share * self._slots)
        bounds = self._queue.bounds(slots=self._slots, ingresses=1)
        reserved = self._queue.reserved(slots=self._slots, ingresses=1)
        self._bounds = [bounds[tier] for tier in _TIERS]
        self._reserved = [reserved[tier] for tier in _TIERS]

    def _report(self) -> ScalingReport:
        tiers = {}
        for rank, tier in enumerate(_TIERS):
            lane = self._lanes[rank]
            # Suspended requests count from when they were suspended, as far as a policy can see.
            oldest = self._now - lane[0].arrived if lane and lane[0].placed < 0 else 0.0
            tiers[tier] = TierReport(
                self._waiting[rank], self._running[rank], oldest, *self._counts[rank]
            )
        cluster = self._cluster
        preempts = float(cluster.preempts)
        pool = PoolReport(
            self._engine.slots, self._ready, start_s=cluster.start_s, preempts=preempts
        )
        share = self._queue.headroom_share(preempts=cluster.preempts)
        return ScalingReport(tiers, {"pool": pool}, share)
