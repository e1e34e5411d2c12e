"""What the failure matrices do to the simulated engines of a model, and wait for."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.cluster import Deployment, eventually_async


async def change_engine(cluster: Deployment, *, model: str, **change: Any) -> None:
    """Change what the model's first engine does, failures for example, while it runs."""

    def tell() -> None:
        with cluster.engine(model, 0) as engine:
            assert engine.post("/simulate", json=change).status_code == 200

    await asyncio.to_thread(tell)


def replica_ids(cluster: Deployment, *, model: str) -> set[str]:
    """The model's replicas, as its Model knows them."""
    return {one.replica_id for one in cluster.snapshot(model).replicas}


async def one_replaced(cluster: Deployment, before: set[str], *, model: str) -> None:
    """Return once a replica is there that was not ``before``.

    There may be two: on a machine that stands still for seconds the other engine fails, too.
    """
    await eventually_async(lambda: replica_ids(cluster, model=model) - before, 60)
