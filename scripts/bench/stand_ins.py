"""Stand-ins for engine replicas on Ray, to measure what telling their status and credits costs.

Ingresses, Model and Serve are the real ones. A stand-in tells the Model that it is ready, as an
EngineReplica does, and has no engine of its own: all name one mock engine, which answers at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from app.config.model import ModelArgs
from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from deployments.engines.base import LOW_FIRST, METERED_STREAM
from scripts.bench.load import regular_arrivals

SLOTS = 8
ASKED_PER_S = 10.0
"""Requests a second for each ingress, where anybody asks: enough for it to have something new to
say in every renewal, and little enough to leave the machine to the control."""
ON_RAY = ("1x1", "4x1", "16x1", "16x2", "16x4", "32x4", "64x4", "64x2", "64x1")
"""The sizes that are measured, replicas x ingresses, in an order in which little must be started
twice."""
_MODEL = "bench/stand-ins"
# So many start at a time: each takes seconds of a core.
_AT_ONCE = 8
_READY_S = 240.0
_SETTLE_S = 4.0
_WINDOW_S = 10.0
_TITLES = {
    "model": "ray::ServeReplica:stand-ins:Model",
    "ingress": "ray::ServeReplica:ingress:Ingress",
    "replica": "ray::ServeReplica:stand-ins:pool",
    "controller": "ray::ServeController",
}


@dataclass(frozen=True, slots=True)
class OnRay:
    """Messages and cores in use.

    Attributes:
        faster: how many times as often as it does the Model asks its replicas.
        requests: answered in a second, of all ingresses together.
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
    requests: float
    asks: float
    renewals: float
    model: float
    ingress: float
    replica: float
    controller: float
    ready_s: float


def status(replica_id: str, engine: str = "http://127.0.0.1:9") -> ReplicaStatus:
    """Return what a stand-in tells of itself."""
    dialect = Dialect("stand-in", True, LOW_FIRST, frozenset(Route), METERED_STREAM)
    return ReplicaStatus(replica_id, "pool", engine, "key" * 14, SLOTS, "1", 4096, dialect)


def build(args: dict[str, Any]) -> Any:
    """Return a model application on stand-ins; ``args`` names their engine."""
    from ray import serve

    from deployments import model

    class StandIn:
        asked = 0

        async def status(self) -> ReplicaStatus:
            self.asked += 1
            return status(serve.get_replica_context().replica_id.unique_id, args["engine"])

        async def count(self) -> int:
            return self.asked

    class FasterModel(model.Model):
        async def __init__(self, *more: Any) -> None:  # type: ignore[misc]
            model.STATUS_PERIOD_S /= args["faster"]
            await super().__init__(*more)

    pool = serve.deployment(
        name="pool", ray_actor_options={"num_cpus": 0}, health_check_period_s=1.0
    )(StandIn)
    described = {"name": "pool", "engine": "simulated", "model": "none", "slots": SLOTS}
    settings = ModelArgs.load({"id": _MODEL, "pools": [described]}, "args")
    # private: `build` binds the Model itself, and this a faster one.
    return model._deployment.options(FasterModel).bind(settings, {"pool": pool.bind()})  # noqa: SLF001


def on_ray(sizes: list[str]) -> Iterator[OnRay]:
    """Deploy each size in turn, and measure it: while nobody asks, and while some do."""
    # It sets what Ray reads when it is imported, so it comes first.
    import tests.conftest  # noqa: F401
    from scripts.bench.gateways import mock_engine
    from tests.support import cluster

    with (
        TemporaryDirectory() as folder,
        mock_engine(Path(folder)) as engine,
        cluster.local_serve() as deployment,
    ):
        known = (0, 0)
        for size in sizes:
            replicas, ingresses, faster = (*map(int, size.split("x")), 1)[:3]
            args = {"faster": faster, "engine": f"http://127.0.0.1:{engine.port}"}
            began = time.monotonic()
            known = _deploy(cluster, deployment, args, known, (replicas, ingresses))
            ready_s = time.monotonic() - began
            for per_s in (0.0, ASKED_PER_S * ingresses):
                time.sleep(_SETTLE_S)
                measured = _measure(cluster, deployment, per_s)
                yield OnRay(replicas, ingresses, faster, **measured, ready_s=ready_s)


def _deploy(
    serving: Any, deployment: Any, args: dict[str, Any], known: tuple[int, int], to: tuple[int, int]
) -> tuple[int, int]:
    """Go from so many replicas and ingresses to others, a few at a time, and return those."""
    replicas, ingresses = to
    steps = range(known[0] + _AT_ONCE, replicas, _AT_ONCE)
    for step in (*steps, replicas):
        application = {
            "name": "stand-ins",
            "route_prefix": None,
            "import_path": "scripts.bench.stand_ins:build",
            "args": args,
            # Here, and not in `args`, lest all of them be replaced when there are to be more.
            "deployments": [
                {"name": "Model", "user_config": {"rate_card": {"input": 1, "output": 2}}},
                {"name": "pool", "num_replicas": step},
            ],
        }
        ingress = serving.ingress_app(replicas=ingresses, discovery_interval_s=2.0)
        deployment.deploy(ingress, application)
        _wait_ready(serving, deployment, step, ingresses)
    return to


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


def _measure(serving: Any, deployment: Any, per_s: float) -> dict[str, float]:
    processes = {name: serving.actors_titled(title) for name, title in _TITLES.items()}
    before = {name: _cpu_s(those) for name, those in processes.items()}
    messages, began = _messages(deployment), time.monotonic()
    answered = asyncio.run(_ask(deployment.base_url, per_s))
    seconds = time.monotonic() - began
    rates = {name: (n - messages[name]) / seconds for name, n in _messages(deployment).items()}
    cores = {
        name: (_cpu_s(those) - before[name]) / seconds / len(those)
        for name, those in processes.items()
    }
    return {"requests": answered / seconds} | rates | cores


async def _ask(base_url: str, per_s: float) -> int:
    """Send requests at equal distances for as long as is measured; return how many got answers."""
    body = {"model": _MODEL, "messages": [{"role": "user", "content": "How wide is the sea?"}]}

    async def one(session: aiohttp.ClientSession, delay_s: float) -> bool:
        await asyncio.sleep(delay_s)
        async with session.post(f"{base_url}/chat/completions", json=body) as response:
            await response.read()
            return response.status == 200

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(_WINDOW_S))
        tasks = [
            group.create_task(one(session, delay_s))
            for delay_s in regular_arrivals(per_s, _WINDOW_S)
        ]
    assert all(task.result() for task in tasks), "every request is answered"
    return len(tasks)


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
