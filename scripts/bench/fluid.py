"""Simulates a fleet as a fluid, for traffic of a billion requests: fourteen days in seconds.

In each tick the work that arrived, in replica-seconds of full batches, is served by the replicas
that are ready: priority first, then default, then flex, oldest first. What is left waits, and is
shed by the queue's bounds. How many requests run follows from the utilisation: the batch at which
an engine's throughput is what was served. Engines preempt.

It cannot see what happens within a tick: a wait shorter than that is 0, so bursts of a few seconds
do not show. ``batching`` follows single requests; docs/autoscaling-traces.md compares the two.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from app.scaling.report import PoolReport, ScalingReport, TierReport
from scripts.bench.batching import Cluster, Served
from scripts.bench.engine_model import EngineModel
from scripts.bench.fleet import Policy, View
from scripts.bench.trace_files import Floats
from scripts.bench.traffic import Traffic

_TIERS = tuple(Tier)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean request: prompt, output and context tokens."""

    prompt: float
    output: float
    context: float


@dataclass(slots=True)
class _Waiting:
    """Requests of one tier that arrived in one tick: arrival, number, work, mean lengths."""

    arrived: float
    number: float
    work: float
    mean: Mean


def batch_at(engine: EngineModel, mean: Mean, utilisation: float) -> tuple[float, float]:
    """Return the batch at a utilisation, and how long a request takes in it, in seconds.

    A request takes ``output`` steps, and the prefill of as many prompts as run beside it.
    """
    each = engine.token_s + engine.kv_s * (mean.context + mean.output / 2)
    fixed = mean.output * engine.base_s
    slope = mean.output * each + engine.token_s * mean.prompt
    full = engine.slots / (fixed + slope * engine.slots)
    rate = min(utilisation, 1.0) * full
    batch = min(float(engine.slots), rate * fixed / max(1.0 - rate * slope, 1e-9))
    return batch, fixed + slope * batch


class FluidSimulation:
    """One run of one policy over one trace, tick by tick."""

    def __init__(self, cluster: Cluster, policy: Policy, queue: QueueSettings) -> None:
        self._cluster, self._policy, self._queue = cluster, policy, queue
        self._ready = cluster.initial
        self._starting: deque[float] = deque()
        self._backlog: list[deque[_Waiting]] = [deque(), deque(), deque()]
        self._counts = [[0.0, 0.0, 0.0] for _ in _TIERS]
        self._running = [0.0, 0.0, 0.0]
        self._served = Served()
        self._next = cluster.control_s

    def run(self, traffic: Traffic, tick_s: float) -> Served:
        """Simulate all of it."""
        ticks = round(traffic.seconds / tick_s)
        number, work, lengths = _by_tick(traffic, ticks, tick_s)
        for tick in range(ticks):
            now = (tick + 1) * tick_s
            while self._starting and self._starting[0] <= now - tick_s:
                self._starting.popleft()
                self._ready += 1
            for rank in range(3):
                if number[rank, tick] > 0:
                    mean = Mean(*lengths[rank, tick])
                    arrived = _Waiting(now - tick_s, number[rank, tick], work[rank, tick], mean)
                    self._backlog[rank].append(arrived)
                    self._counts[rank][0] += arrived.number
            self._serve(now, tick_s)
            if now >= self._next - 1e-6:
                self._next += self._cluster.control_s
                self._control(now)
        return self._served

    def _serve(self, now: float, tick_s: float) -> None:
        engine = self._cluster.engine
        capacity = left = self._ready * tick_s
        done, tokens = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        prompts = contexts = 0.0
        for rank, lane in enumerate(self._backlog):
            while lane and left > 0:
                first = lane[0]
                share = min(1.0, left / first.work) if first.work > 0 else 1.0
                number = share * first.number
                left -= share * first.work
                done[rank] += number
                tokens[rank] += number * first.mean.output
                prompts += number * first.mean.prompt
                contexts += number * first.mean.context
                self._record(rank, first.arrived, max(0.0, now - first.arrived - tick_s), number,
                             first.mean)  # fmt: skip
                if share >= 1.0:
                    lane.popleft()
                else:
                    first.number -= number
                    first.work -= share * first.work
                    break
        total = sum(done)
        if total:
            mean = Mean(prompts / total, sum(tokens) / total, contexts / total)
            batch, service_s = batch_at(engine, mean, 1 - left / capacity)
            for rank in range(3):
                # A request holds its slot for as many steps as it generates tokens.
                share = tokens[rank] / sum(tokens)
                self._running[rank] = self._ready * batch * share
                self._counts[rank][1] += done[rank]
                self._counts[rank][2] += total * service_s * share
        else:
            self._running = [0.0, 0.0, 0.0]
        self._shed(now)

    def _record(self, rank: int, arrived: float, wait: float, number: float, mean: Mean) -> None:
        served, engine = self._served, self._cluster.engine
        idle_s = engine.prefill_s(mean.prompt)
        served.waits[rank].append((arrived, wait, number))
        served.first[rank].append((arrived, wait + idle_s, idle_s, number))
        served.ended[rank].append((arrived, wait + idle_s, number))
        served.tokens += number * (mean.prompt + mean.output)

    def _shed(self, now: float) -> None:
        slots = self._ready * self._cluster.engine.slots
        bounds = self._queue.bounds(slots=slots, ingresses=1)
        reserved = self._queue.reserved(slots=slots, ingresses=1)
        waiting = [sum(one.number for one in lane) for lane in self._backlog]
        for rank in (2, 1, 0):
            tier, lane = _TIERS[rank], self._backlog[rank]
            over = min(sum(waiting) - bounds[tier], waiting[rank] - reserved[tier])
            while lane and over > 1e-9:
                newest = lane[-1]
                gone = min(over, newest.number)
                newest.work *= 1 - gone / newest.number
                newest.number -= gone
                over -= gone
                waiting[rank] -= gone
                self._lost(rank, newest.arrived, gone)
                if newest.number <= 1e-9:
                    lane.pop()
            while lane and now - lane[0].arrived > self._queue.of(tier).max_wait_s:
                late = lane.popleft()
                waiting[rank] -= late.number
                self._lost(rank, late.arrived, late.number)

    def _lost(self, rank: int, arrived: float, number: float) -> None:
        self._served.first[rank].append((arrived, math.inf, 0.0, number))
        self._served.ended[rank].append((arrived, math.inf, number))

    def _control(self, now: float) -> None:
        target = self._ready + len(self._starting)
        waiting = [sum(one.number for one in lane) for lane in self._backlog]
        tiers = {
            tier: TierReport(
                waiting[rank], self._running[rank],
                now - self._backlog[rank][0].arrived if self._backlog[rank] else 0.0,
                *self._counts[rank],
            )
            for rank, tier in enumerate(_TIERS)
        }  # fmt: skip
        cluster = self._cluster
        pool = PoolReport(cluster.engine.slots, self._ready, start_s=cluster.start_s, preempts=1.0)
        report = ScalingReport(tiers, {"pool": pool}, self._queue.headroom_share(preempts=True))
        total = round(sum(waiting) + sum(self._running))
        view = View(now, target, self._ready, total, report)
        wanted = min(max(self._policy.decide(view), 1), cluster.most)
        for _ in range(wanted - target):
            self._starting.append(now + cluster.start_s)
        for _ in range(target - wanted):
            if self._starting:
                self._starting.pop()
            else:
                self._ready -= 1
        self._served.history.append((now, self._ready + len(self._starting), wanted))


def _by_tick(traffic: Traffic, ticks: int, tick_s: float) -> tuple[Floats, Floats, Floats]:
    """Return numbers, work and mean lengths by tier and tick."""
    columns = traffic.columns
    index = np.minimum((columns[:, 0] / tick_s).astype(int), ticks - 1)
    flat = columns[:, 1].astype(int) * ticks + index

    def added(weights: Floats) -> Floats:
        return np.bincount(flat, weights, minlength=3 * ticks).reshape(3, ticks).astype(float)

    number = added(columns[:, 5])
    sums = [added(columns[:, 5] * columns[:, k]) for k in (2, 3, 4)]
    lengths: Floats = np.stack(sums, axis=2) / np.maximum(number, 1e-9)[:, :, None]
    return number, added(traffic.work), lengths
