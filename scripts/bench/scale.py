#!/usr/bin/env python
"""What control costs as replicas grow: the Model's and the ingresses' work when nobody asks.

    scripts/bench/scale.py            the decisions alone, in this process, up to 1,000 replicas
    scripts/bench/scale.py --ray      and the whole of it on Ray, up to 32 replicas (4 minutes)

Replicas are stand-ins without an engine: they tell the Model that they are ready, as an
EngineReplica does. Run it in the tests' environment: `FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.book import Capacity, CreditBook
from app.config import ModelArgs, ModelSettings
from app.dialect import Dialect, Route
from app.gate import Gate
from app.line_settings import LineSettings
from app.places import Offer
from app.snapshot import ModelSnapshot, ReplicaStatus
from app.ticket import Ticket
from app.tiers import PriorityMode, Tier
from deployments.engines.base import LOW_FIRST, METERED_STREAM

SLOTS = 8
RENEWALS_S = 4
"""Renewals a second of each ingress."""
STATUS_S = 2
"""How often a second the Model asks each replica."""
_GRACE_S = 30.0
_SETTLE_S = 4.0
_WINDOW_S = 10.0
_ON_RAY = ((1, 1), (4, 1), (16, 1), (32, 1), (16, 2), (16, 4))
_IN_PROCESS = ((1, 1), (16, 1), (64, 1), (64, 4), (256, 16), (1000, 16), (1000, 64))


def status(number: int, replica_id: str | None = None) -> ReplicaStatus:
    """Return what a stand-in tells of itself."""
    dialect = Dialect("stand-in", True, LOW_FIRST, frozenset(Route), METERED_STREAM)
    name = replica_id or f"{number:08x}"
    return ReplicaStatus(name, "pool", "http://127.0.0.1:9", "key" * 14, SLOTS, "1", 4096, dialect)


# --- the decisions alone ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decisions:
    """Processor time, in microseconds, and bytes, where half of all slots are busy.

    Attributes:
        renew_us: of the Model, for one ingress's renewal.
        ingress_us: of an ingress, for one renewal: its demand, and taking the grant.
        change_us: of an ingress, to take over a changed set of replicas.
        demand_bytes: what an ingress sends.
        snapshot_bytes: what a change sends to every ingress.
    """

    replicas: int
    ingresses: int
    renew_us: float
    ingress_us: float
    change_us: float
    demand_bytes: int
    snapshot_bytes: int


def decisions(replicas: int, ingresses: int) -> Decisions:
    """Measure gates and a credit book as they are when they serve."""
    statuses = [status(number) for number in range(replicas)]
    book = CreditBook("life", LineSettings(), 0.0)
    book.set_replicas(Capacity(s.replica_id, s.pool, s.slots, kept=True) for s in statuses)
    offers = [Offer(s.replica_id, s.pool, s.slots, s.dialect.priority_routes) for s in statuses]
    gates = [Gate(str(number), LineSettings()) for number in range(ingresses)]
    now = 10.0
    for gate in gates:
        gate.set_replicas(offers, PriorityMode.AUTO, now)
    for step in range(40):
        now = _round(book, gates, now)
        if step == 20:
            _occupy(gates, replicas * SLOTS // 2 // ingresses, now)
    spent: dict[str, float] = {"demand": 0.0, "renew": 0.0, "receive": 0.0}
    for _ in range(20):
        now = _round(book, gates, now, spent)
    renewals = 20 * ingresses
    demand = pickle.dumps(gates[0].demand(now))
    began = time.process_time()
    gates[0].set_replicas(offers[1:], PriorityMode.AUTO, now)
    gates[0].set_replicas(offers, PriorityMode.AUTO, now)
    change_s = (time.process_time() - began) / 2
    snapshot = ModelSnapshot("m", (), "", 0, ModelSettings(), tuple(statuses))
    return Decisions(
        replicas, ingresses,
        renew_us=spent["renew"] / renewals * 1e6,
        ingress_us=(spent["demand"] + spent["receive"]) / renewals * 1e6,
        change_us=change_s * 1e6,
        demand_bytes=len(demand),
        snapshot_bytes=len(pickle.dumps(snapshot)),
    )  # fmt: skip


def _round(
    book: CreditBook, gates: list[Gate], now: float, spent: dict[str, float] | None = None
) -> float:
    """Let every ingress renew once, a quarter of a second after the last time."""
    spent = spent if spent is not None else {"demand": 0.0, "renew": 0.0, "receive": 0.0}
    now += 1 / RENEWALS_S
    for gate in gates:
        demand = _timed(spent, "demand", lambda gate=gate: gate.demand(now))
        grant = _timed(spent, "renew", lambda demand=demand: book.renew(demand, now))
        _timed(spent, "receive", lambda gate=gate, grant=grant: gate.receive(grant, now))
    return now


def _timed(spent: dict[str, float], name: str, what: Callable[[], Any]) -> Any:
    began = time.thread_time()
    value = what()
    spent[name] += time.thread_time() - began
    return value


def _occupy(gates: list[Gate], each: int, now: float) -> None:
    for gate in gates:
        for number in range(each):
            ticket = Ticket(Tier.DEFAULT, "tenant", 100, route=Route.CHAT, prefix=number * 7919)
            gate.arrive(ticket, now)


# --- on Ray -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OnRay:
    """Cores in use while nobody asks.

    Attributes:
        model: of the Model's process.
        ingress: of one ingress, on average.
        controller: of Serve's controller, which watches every replica.
    """

    replicas: int
    ingresses: int
    model: float
    ingress: float
    controller: float


def build(args: dict[str, Any]) -> Any:
    """Return a model application on stand-ins; ``args`` tells how many."""
    from ray import serve

    from deployments.model import _deployment

    class StandIn:
        async def status(self) -> ReplicaStatus:
            return status(0, serve.get_replica_context().replica_id.unique_id)

    pool = serve.deployment(
        name="pool",
        num_replicas=args["replicas"],
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1.0,
    )(StandIn)
    described = {"name": "pool", "engine": "simulated", "model": "none", "slots": SLOTS}
    settings = ModelArgs.load({"id": "bench/stand-ins", "pools": [described]}, "args")
    return _deployment.bind(settings, {"pool": pool.bind()})


def on_ray() -> Iterator[OnRay]:
    """Deploy each size in turn, and measure it."""
    # It sets what Ray reads when it is imported, so it comes first.
    import tests.conftest  # noqa: F401
    from tests import serving

    with serving.local_serve() as deployment:
        for replicas, ingresses in _ON_RAY:
            application = {
                "name": "stand-ins",
                "route_prefix": None,
                "import_path": "scripts.bench.scale:build",
                "args": {"replicas": replicas},
            }
            ingress = serving.ingress_app(replicas=ingresses, catalog_interval_s=2.0)
            deployment.deploy(ingress, application)
            yield _measure(serving, deployment, replicas, ingresses)


def _measure(serving: Any, deployment: Any, replicas: int, ingresses: int) -> OnRay:
    def ready() -> bool:
        with suppress(Exception):
            known = len(deployment.snapshot("stand-ins").replicas)
            return known == replicas and len(serving.ingress_processes()) == ingresses
        return False

    serving.eventually(ready, 120, f"{replicas} stand-ins were not ready")
    time.sleep(_SETTLE_S)
    titles = {
        "model": "ray::ServeReplica:stand-ins:Model",
        "ingress": "ray::ServeReplica:ingress:Ingress",
        "controller": "ray::ServeController",
    }
    processes = {name: serving.actors_titled(title) for name, title in titles.items()}
    before = {name: _cpu_s(those) for name, those in processes.items()}
    time.sleep(_WINDOW_S)
    cores = {name: (_cpu_s(p) - before[name]) / _WINDOW_S for name, p in processes.items()}
    cores["ingress"] /= ingresses
    return OnRay(replicas, ingresses, **cores)


def _cpu_s(processes: list[Any]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


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
    parser.add_argument("--ray", action="store_true", help="on Ray, too")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results")
    options = parser.parse_args()
    if options.ray and "FRONTLINE_BENCH_CONTAINED" not in os.environ:
        from scripts.contain import Containment

        os.environ["FRONTLINE_BENCH_CONTAINED"] = "1"
        sys.exit(Containment([sys.executable, *sys.argv], _GRACE_S).run())
    alone = [decisions(*size) for size in _IN_PROCESS]
    show(alone)
    cluster = []
    for row in on_ray() if options.ray else ():
        cluster.append(row)
        print(row, flush=True)
    if cluster:
        show(cluster)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"decisions": [asdict(r) for r in alone], "on_ray": [asdict(r) for r in cluster]}
    (options.out / "scale.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
