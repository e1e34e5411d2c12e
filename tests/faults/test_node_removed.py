"""A worker node is removed under load: its replica and its engine with it."""

import asyncio
import time
from contextlib import contextmanager, suppress

import pytest
from ray._private import worker
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from tests.faults.clients import COMPLETE, CUT, Clients, check_bill, told
from tests.serving import engine_processes, eventually, eventually_async, ingress_app, pooled_app

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

AWAY = "away"


@contextmanager
def another_node():
    """A worker node beside the head node that the tests' cluster has."""
    nodes = Cluster()
    nodes.head_node = worker._global_node
    node = nodes.add_node(num_cpus=4, resources={AWAY: 1})
    try:
        yield lambda: nodes.remove_node(node, allow_graceful=False)
    finally:
        if node in nodes.worker_nodes:
            nodes.remove_node(node, allow_graceful=False)


@pytest.fixture
def spread(cluster):
    """A model with one replica on each of two nodes; with it comes what removes the second."""
    with another_node() as remove_it:
        pools = {pool: {"tokens_per_second": 60} for pool in ("here", AWAY)}
        app = pooled_app("spread", pools)
        for options in app["deployments"]:
            if options["name"] == AWAY:
                options["ray_actor_options"]["resources"] = {AWAY: 1}
        cluster.deploy(ingress_app(), app)
        eventually(lambda: pools_of(cluster) == ["here", AWAY], 60, "not ready")
        yield cluster, remove_it
        cluster.remove("spread")


def pools_of(cluster):
    """The pools that have a replica; none while the Model is away, which may be on that node."""
    if cluster.entry("spread") is None:
        return []
    with suppress(RayError, RayServeException, TimeoutError):
        return [replica.pool for replica in cluster.snapshot("spread").replicas]
    return []


def engines():
    words = [process.cmdline() for process in engine_processes()]
    return [one for one in words if "test/spread" in one and "reaper" not in str(one)]


async def test_a_worker_node_is_removed(spread):
    cluster, remove_it = spread
    clients = Clients(cluster, "spread")
    async with clients.asking():
        await asyncio.sleep(2)
        await asyncio.to_thread(remove_it)
        removed = time.monotonic()
        await eventually_async(lambda: pools_of(cluster) == ["here"], 120)
        took_s = time.monotonic() - removed
        await asyncio.sleep(3)
    print(f"\n| worker node removed | {told(clients.answers)} | {took_s:.1f} s |")
    assert set(clients.outcomes()) <= {COMPLETE, CUT}
    assert len(clients.answers) - len(clients.complete()) <= clients.count
    assert len(engines()) == 1, "an engine outlived its node"
    print(await asyncio.to_thread(check_bill, cluster, clients.answers))
