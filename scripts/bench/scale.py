#!/usr/bin/env python
"""What control costs as replicas grow: the Model's and the ingresses' work when nobody asks.

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
_ON_RAY = ("1x1", "4x1", "16x1", "16x2", "16x4", "32x1", "64x1", "16x1x8", "16x1x32")
_READY_S = 280.0
_TITLES = {
    "model": "ray::ServeReplica:stand-ins:Model",
    "ingress": "ray::ServeReplica:ingress:Ingress",
    "replica": "ray::ServeReplica:stand-ins:pool",
    "controller": "ray::ServeController",
}
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
    """Messages and cores in use while nobody asks.

    Attributes:
        faster: how many times as often as it does the Model asks its replicas.
        asks: answers a second that the Model got from its replicas, all together.
        renewals: a second, of all ingresses together.
        model: cores, of the Model's process.
        ingress: of one ingress, on average.
        replica: of one stand-in, on average.
        controller: of Serve's controller, which watches every replica.
        ready_s: how long it took until all were ready.
    """

    replicas: int
    ingresses: int
    faster: int
    asks: float
    renewals: float
    model: float
    ingress: float
    replica: float
    controller: float
    ready_s: float


def build(args: dict[str, Any]) -> Any:
    """Return a model application on stand-ins; ``args`` tells how many."""
    from ray import serve

    from deployments import model

    class StandIn:
        asked = 0

        async def status(self) -> ReplicaStatus:
            self.asked += 1
            return status(0, serve.get_replica_context().replica_id.unique_id)

        async def count(self) -> int:
            return self.asked

    class FasterModel(model.Model):
        async def __init__(self, *more: Any) -> None:
            model._STATUS_PERIOD_S /= args["faster"]
            await super().__init__(*more)

    pool = serve.deployment(
        name="pool",
        num_replicas=args["replicas"],
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1.0,
    )(StandIn)
    described = {"name": "pool", "engine": "simulated", "model": "none", "slots": SLOTS}
    settings = ModelArgs.load({"id": "bench/stand-ins", "pools": [described]}, "args")
    return model._deployment.options(FasterModel).bind(settings, {"pool": pool.bind()})


def on_ray(sizes: list[str]) -> Iterator[OnRay]:
    """Deploy each size in turn, and measure it."""
    # It sets what Ray reads when it is imported, so it comes first.
    import tests.conftest  # noqa: F401
    from tests import serving

    with serving.local_serve() as deployment:
        for size in sizes:
            replicas, ingresses, faster = (*map(int, size.split("x")), 1)[:3]
            application = {
                "name": "stand-ins",
                "route_prefix": None,
                "import_path": "scripts.bench.scale:build",
                "args": {"replicas": replicas, "faster": faster},
            }
            ingress = serving.ingress_app(replicas=ingresses, catalog_interval_s=2.0)
            began = time.monotonic()
            deployment.deploy(ingress, application)
            _wait_ready(serving, deployment, replicas, ingresses)
            ready_s = time.monotonic() - began
            time.sleep(_SETTLE_S)
            measured = _measure(serving, deployment)
            yield OnRay(replicas, ingresses, faster, **measured, ready_s=ready_s)


def _wait_ready(serving: Any, deployment: Any, replicas: int, ingresses: int) -> None:
    def ready() -> bool:
        with suppress(Exception):
            board = deployment.board("stand-ins")
            known = len(board.snapshot.replicas), len(board.ingresses)
            titles = (_TITLES["replica"], _TITLES["ingress"])
            running = tuple(len(serving.actors_titled(title)) for title in titles)
            return known == running == (replicas, ingresses)
        return False

    serving.eventually(ready, _READY_S, f"{replicas} stand-ins were not ready")


def _measure(serving: Any, deployment: Any) -> dict[str, float]:
    processes = {name: serving.actors_titled(title) for name, title in _TITLES.items()}
    before = {name: _cpu_s(those) for name, those in processes.items()}
    messages, began = _messages(deployment), time.monotonic()
    time.sleep(_WINDOW_S)
    seconds = time.monotonic() - began
    rates = {name: (n - messages[name]) / seconds for name, n in _messages(deployment).items()}
    cores = {
        name: (_cpu_s(those) - before[name]) / seconds / len(those)
        for name, those in processes.items()
    }
    return rates | cores


def _messages(deployment: Any) -> dict[str, int]:
    """How many questions replicas have answered, and how many renewals there have been."""
    from ray import serve

    pool = serve.get_deployment_handle("pool", app_name="stand-ins")
    board = deployment.board("stand-ins")
    return {
        "asks": sum(pool.broadcast("count").results(timeout_s=30)),
        "renewals": sum(one.demand.number for one in board.ingresses),
    }


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
    parser.add_argument("--ray", action="store_true", help="on Ray instead")
    parser.add_argument("--sizes", nargs="+", default=_ON_RAY, help="replicas x ingresses, on Ray")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results")
    options = parser.parse_args()
    if options.ray and "FRONTLINE_BENCH_CONTAINED" not in os.environ:
        from scripts.contain import Containment

        os.environ["FRONTLINE_BENCH_CONTAINED"] = "1"
        sys.exit(Containment([sys.executable, *sys.argv], _GRACE_S).run())
    rows: list[Any] = []
    measured = on_ray(options.sizes) if options.ray else _decisions()
    for row in measured:
        rows.append(row)
        print(row, flush=True)
    show(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ("scale-on-ray.json" if options.ray else "scale-decisions.json")
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _decisions() -> Iterator[Decisions]:
    return (decisions(*size) for size in _IN_PROCESS)


if __name__ == "__main__":
    main()
