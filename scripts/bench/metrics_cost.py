#!/usr/bin/env python
"""What metrics cost an ingress, in processor time: for each request, and once a second.

    scripts/bench/metrics_cost.py                 about a minute, in this process, without a cluster

Requests tell three observers of their end (`Tallies`, `Measurements`, `SloWatch`); nothing else of
metrics is on their path. Turns with them and without any alternate. Beside the requests, a task
pushes all series to Ray's exporter once a second. Each figure is the least of many rounds, because
other work on the machine only ever adds to it. Run it in the tests' environment:
`FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.config.slo import SloSettings
from app.core.dialect import Route
from app.core.pricing import FREE, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.flow.stats import PoolSlots, QueueState
from app.gateway.telemetry import queue_samples, slo_samples, traffic_samples
from app.ledger.record import Origin, State, UsageRecord, now_utc
from app.observe.exporter import Exporter, Sample
from app.observe.measurements import Measurements
from app.observe.observers import Ended, Observers
from app.observe.slo import SloWatch
from app.observe.tallies import Tallies
from scripts.bench.progress import steps

_REQUESTS: Final = 2000
_MODELS: Final = (1, 10, 100)
_BUDGET_US: Final = 420.0
"""What a unary request may cost an ingress."""
_SLO: Final = SloSettings.load({tier.value: {"ttft_ms": 500} for tier in Tier}, "slo")


class World:
    """The metrics of an ingress with so many models."""

    def __init__(self, models: int) -> None:
        self.models = [f"bench/model-{number}" for number in range(models)]
        self.tallies, self.measurements = Tallies(), Measurements()
        self.observers = Observers(
            self.tallies, self.measurements, SloWatch(lambda model: _SLO, self.tallies)
        )
        nobody = dict.fromkeys(Tier, 0)
        slots = {"vllm": PoolSlots(8, 4, 4)}
        self._queue = QueueState(nobody, nobody, nobody, {}, nobody, slots)
        self.ends = [
            _ended(model, tier, number)
            for model in self.models
            for tier in Tier
            for number in range(-(-_REQUESTS // (len(Tier) * models)))
        ]

    def samples(self) -> Iterator[Sample]:
        """Yield what `Telemetry` yields of models and requests."""
        for model in self.models:
            traffic = self.tallies.of(model)
            yield from queue_samples(model, self._queue)
            yield from traffic_samples(model, traffic, {})
            yield from slo_samples(model, _SLO, traffic)
        yield from self.measurements.samples(self.models)


def _ended(model: str, tier: Tier, number: int) -> Ended:
    origin = Origin(
        f"req_{number}", "t", "k", model, Route.CHAT.value, True, tier, now_utc()
    )  # fmt: skip
    decision = TierDecision(tier, tier, None, FREE)
    record = UsageRecord.open(origin, decision, engine="vllm", replica="r", queue_s=0.01)
    ended = origin.arrived + timedelta(seconds=2)
    usage = TokenUsage(200, 50, 100)
    return Ended(record.settle(State.COMPLETED, usage, ended=ended, ttft_s=0.01 * number), 200)


def per_request_us(observers: Observers, ends: list[Ended]) -> float:
    """Return the processor time of telling observers of one end, in microseconds."""
    began = time.thread_time()
    for one in ends:
        observers.ended(one)
    return 1e6 * (time.thread_time() - began) / len(ends)


def push_ms(push: Callable[[], None]) -> float:
    """Return the processor time of one push, in milliseconds."""
    began = time.thread_time()
    push()
    return 1e3 * (time.thread_time() - began)


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    world, without = World(1), Observers()
    on, off = [], []
    for _ in steps(range(rounds), "requests"):
        on.append(per_request_us(world.observers, world.ends))
        off.append(per_request_us(without, world.ends))
    cost = min(on) - min(off)
    print("| | us of CPU a request |\n|---|--:|")
    print(f"| with metrics | {min(on):.2f} |\n| without | {min(off):.2f} |")
    print(f"| difference | {cost:.2f} ({100 * cost / _BUDGET_US:.1f} % of {_BUDGET_US:.0f} us) |\n")
    print("| models | values | ms of CPU a push, all changed | nothing changed | of one core |")
    print("|--:|--:|--:|--:|--:|")
    for models in _MODELS:
        print(row(models, max(3, rounds // (4 * models))))


def row(models: int, rounds: int) -> str:
    """Measure the pushes with so many models."""
    world = World(models)
    with asyncio.Runner() as runner:
        exporter = Exporter(world.samples)

        def push() -> None:
            runner.run(exporter.push())

        push()
        busy, idle = [], []
        for _ in steps(range(rounds), f"{models} models"):
            for one in world.ends:
                world.observers.ended(one)
            busy.append(push_ms(push))
            idle.append(push_ms(push))
    values = sum(
        1 if isinstance(one.value, int | float) else len(one.value.counts) + 2
        for one in world.samples()
    )
    share = f"{min(idle) / 10:.1f} to {min(busy) / 10:.1f} %"
    return f"| {models} | {values:,} | {min(busy):.2f} | {min(idle):.2f} | {share} |"


if __name__ == "__main__":
    main()
