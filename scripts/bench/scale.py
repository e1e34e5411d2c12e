#!/usr/bin/env python
"""What control costs as replicas grow: the Model's and the ingresses' work beside the requests.

    scripts/bench/scale.py            the decisions alone, in this process, up to 1,000 replicas
    scripts/bench/scale.py --ray      the whole of it on Ray, up to 64 replicas (10 minutes)
    scripts/bench/scale.py --ray --sizes 16x2 16x1x8
                                      with 16 replicas and 2 ingresses; then with 16 and 1, where
                                      the Model asks its replicas 8 times as often as it does

Replicas are stand-ins without an engine: they tell the Model that they are ready, as an
EngineReplica does. Run it in the tests' environment: `FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.config.model import ModelSettings
from app.config.queue import QueueSettings
from app.contracts.credits import Demand, Grant
from app.contracts.status import ModelSnapshot
from app.core.dialect import Route
from app.core.tiers import PriorityMode, Tier
from app.flow.allocation.allocator import Capacity, CreditAllocator
from app.flow.credits import RENEWAL_S
from app.flow.request import QueuedRequest
from app.flow.scheduler import Scheduler
from app.flow.slots import Offer
from scripts.bench.contained import contain
from scripts.bench.progress import steps
from scripts.bench.stand_ins import ON_RAY, SLOTS, on_ray, status

_PARTS = ("demand", "renew", "receive")
_IN_PROCESS = ((1, 1), (16, 1), (64, 1), (64, 4), (256, 16), (1000, 16), (1000, 64))


@dataclass(frozen=True, slots=True)
class Decisions:
    """Processor time, in microseconds, and bytes, where half of all slots are busy.

    Attributes:
        renew_us: of the Model, for one ingress's renewal, where what runs has changed.
        quiet_us: the same, where nothing has, anywhere.
        ingress_us: of an ingress, for one renewal: its demand, and taking the grant.
        change_us: of an ingress, to take over a changed set of replicas.
        demand_bytes: what an ingress sends.
        snapshot_bytes: what a change sends to every ingress.
    """

    replicas: int
    ingresses: int
    renew_us: float
    quiet_us: float
    ingress_us: float
    change_us: float
    demand_bytes: int
    snapshot_bytes: int


def decisions(replicas: int, ingresses: int) -> Decisions:
    """Measure schedulers and a credit allocator as they are when they serve."""
    statuses = [status(f"{number:08x}") for number in range(replicas)]
    allocator = CreditAllocator("life", QueueSettings(), 0.0)
    allocator.set_replicas(Capacity(s.replica_id, s.pool, s.slots, honours=True) for s in statuses)
    offers = [Offer(s.replica_id, s.pool, s.slots, s.dialect.priority_routes) for s in statuses]
    schedulers = [Scheduler(str(number), QueueSettings()) for number in range(ingresses)]
    now = 10.0
    for scheduler in schedulers:
        scheduler.set_replicas(offers, PriorityMode.AUTO, now)
    for _ in range(20):
        now = _round(allocator, schedulers, now)
    running = [
        _occupy(scheduler, replicas * SLOTS // 2 // ingresses, now) for scheduler in schedulers
    ]
    for _ in range(20):
        now = _round(allocator, schedulers, now)
    quiet, spent = dict.fromkeys(_PARTS, 0.0), dict.fromkeys(_PARTS, 0.0)
    for step in range(20):
        now = _round(allocator, schedulers, now, quiet)
        _stir(schedulers, running, step, now)
        now = _round(allocator, schedulers, now, spent)
        now = _round(allocator, schedulers, now)
    renewals = 20 * ingresses
    demand = pickle.dumps(schedulers[0].demand(now))
    began = time.process_time()
    schedulers[0].set_replicas(offers[1:], PriorityMode.AUTO, now)
    schedulers[0].set_replicas(offers, PriorityMode.AUTO, now)
    change_s = (time.process_time() - began) / 2
    snapshot = ModelSnapshot("m", (), "", 0, ModelSettings(), tuple(statuses))
    return Decisions(
        replicas, ingresses,
        renew_us=spent["renew"] / renewals * 1e6,
        quiet_us=quiet["renew"] / renewals * 1e6,
        ingress_us=(spent["demand"] + spent["receive"]) / renewals * 1e6,
        change_us=change_s * 1e6,
        demand_bytes=len(demand),
        snapshot_bytes=len(pickle.dumps(snapshot)),
    )  # fmt: skip


def _round(
    allocator: CreditAllocator,
    schedulers: list[Scheduler],
    now: float,
    spent: dict[str, float] | None = None,
) -> float:
    """Let every ingress renew once, a quarter of a second after the last time."""
    spent = spent if spent is not None else dict.fromkeys(_PARTS, 0.0)
    now += RENEWAL_S
    for scheduler in schedulers:
        demand = _timed(spent, "demand", partial(scheduler.demand, now))
        grant = _timed(spent, "renew", partial(_renew, allocator, demand, now))
        _timed(spent, "receive", partial(scheduler.receive, grant, now))
    return now


def _renew(allocator: CreditAllocator, demand: Demand, now: float) -> Grant:
    """Do what a Model does about a renewal."""
    grant = allocator.renew(demand, now)
    allocator.wakeups(now)
    return grant


def _timed(spent: dict[str, float], name: str, what: Callable[[], Any]) -> Any:
    began = time.thread_time()
    value = what()
    spent[name] += time.thread_time() - began
    return value


def _occupy(scheduler: Scheduler, slots: int, now: float) -> list[QueuedRequest]:
    requests = [
        QueuedRequest(Tier.DEFAULT, "tenant", 100, route=Route.CHAT, prefix=number * 7919)
        for number in range(slots)
    ]
    for request in requests:
        scheduler.arrive(request, now)
    return requests


def _stir(
    schedulers: list[Scheduler], running: list[list[QueuedRequest]], step: int, now: float
) -> None:
    """Let a request end at every other ingress, and one come at the others; then the reverse."""
    for number, (scheduler, requests) in enumerate(zip(schedulers, running, strict=True)):
        if (number + step) % 2:
            requests += _occupy(scheduler, 1, now)
        elif requests:
            scheduler.end(requests.pop(), now)


def show(rows: list[Any]) -> None:
    """Print rows of one kind as a table in Markdown."""
    fields = [asdict(row) for row in rows]
    print("\n| " + " | ".join(fields[0]) + " |\n|" + " --: |" * len(fields[0]))
    for each in fields:
        cells = [f"{v:.3g}" if isinstance(v, float) else f"{v:,}" for v in each.values()]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ray", action="store_true", help="on Ray instead")
    parser.add_argument("--sizes", nargs="+", default=ON_RAY, help="replicas x ingresses, on Ray")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results")
    options = parser.parse_args()
    if options.ray:
        contain()
    rows: list[Any] = []
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ("scale-on-ray.json" if options.ray else "scale-decisions.json")
    measured = on_ray(options.sizes) if options.ray else _decisions()
    total = len(options.sizes if options.ray else _IN_PROCESS)
    for row in steps(measured, "sizes", total=total):
        rows.append(row)
        print(row, flush=True)
        # Each time, as a run may be ended before it has come to the largest.
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    show(rows)


def _decisions() -> Iterator[Decisions]:
    return (decisions(*size) for size in _IN_PROCESS)


if __name__ == "__main__":
    main()
