"""A worker node is removed under load: its replica and its engine with it."""

import asyncio
import os
import time
from contextlib import contextmanager
from decimal import Decimal

import openai
import pytest
from ray._private import worker
from ray.cluster_utils import Cluster

from app.flow.scheduler import GIVE_UP_S
from tests.faults.clients import COMPLETE, CUT, Clients, check_bill, told
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually,
    eventually_async,
    ingress_app,
    pooled_app,
    running_ingresses,
)
from tests.support.waiting import SLOWEST

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

AWAY = "away"
HEAD = "node:__internal_head__"  # Ray's own: on the head node alone
LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
NO_HEADROOM = {"queue": {"headroom": 0}}


@contextmanager
def another_node():
    """A worker node beside the head node that the tests' cluster has."""
    nodes = Cluster()
    # private: Ray's Cluster takes over a head node that it has not started in no other way.
    nodes.head_node = worker._global_node  # noqa: SLF001
    node = nodes.add_node(num_cpus=4, resources={AWAY: 2})
    try:
        yield lambda: nodes.remove_node(node, allow_graceful=False)
    finally:
        if node in nodes.worker_nodes:
            nodes.remove_node(node, allow_graceful=False)


@pytest.fixture
def spread(cluster):
    """A model with one replica on each of two nodes, and what removes the second.

    In the long form a model, too, that is on the second alone.
    """
    cluster.deploy(ingress_app())
    # It, and a replica, are to be on the node that stays.
    eventually(lambda: running_ingresses() == 1, 60, "no ingress")
    with another_node() as remove_it:
        pools = {pool: {"tokens_per_second": 60} for pool in ("here", AWAY)}
        spread = pooled_app("spread", pools)
        alone = pooled_app("alone", {AWAY: {"tokens_per_second": 20, "slots": 1}}, NO_HEADROOM)
        where = {AWAY: {AWAY: 1}, "here": {HEAD: 0.001}}
        for options in (*spread["deployments"], *alone["deployments"]):
            if options["name"] in where:
                options["ray_actor_options"]["resources"] = where[options["name"]]
        apps = [spread, alone] if LONG else [spread]
        cluster.deploy(*apps)
        eventually(lambda: pools_of(cluster) == ["here", AWAY], 60, "not ready")
        cluster.wait_ready(*(app["name"] for app in apps))
        yield cluster, remove_it
        for app in apps:
            cluster.remove(app["name"])


def pools_of(cluster):
    """The pool of each replica. The Model may be on the node that is lost."""
    return [replica.pool for replica in cluster.replicas("spread")]


def engines():
    words = [command_line(process) for process in engine_processes()]
    return [one for one in words if "test/spread" in one and "reaper" not in str(one)]


async def wait_in_line(client):
    """A request that waits for the only slot of the model that is on the second node alone."""
    hello = {"model": "alone", "messages": [{"role": "user", "content": "hello"}]}
    long = await client.chat.completions.create(**hello, stream=True, max_tokens=4000)
    waiting = asyncio.create_task(client.chat.completions.create(**hello))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    return long, waiting


async def check_told_at_last(cluster, long, waiting, removed):
    """What runs on the node breaks off; who waits for it is told that there is no such node."""
    with pytest.raises(openai.APIError):
        async for _ in long:
            pass
    with pytest.raises(openai.InternalServerError) as refused:
        await waiting
    answer = refused.value
    assert (answer.status_code, answer.code) == (503, "engine_not_offered")
    assert answer.response.headers["retry-after"] == "60"
    waited_s = time.monotonic() - removed
    assert GIVE_UP_S < waited_s < GIVE_UP_S + SLOWEST * 30
    print(f"who waited in vain was told after {waited_s:.1f} s")
    # Nobody waits for the record of a request that was not served.
    [record] = await eventually_async(lambda: cluster.records(reason="engine_not_offered"))
    # Failed, if it got the slot of the one before before the ingress knew that all was lost.
    assert record["state"] in ("shed", "failed") and Decimal(record["cost"]) == 0
    assert record["model"] == "test/alone"


async def test_a_worker_node_is_removed(spread):
    cluster, remove_it = spread
    clients = Clients(cluster, "spread")
    async with clients.asking(), cluster.async_client() as client:
        in_vain = await wait_in_line(client) if LONG else None
        await asyncio.sleep(2)
        await asyncio.to_thread(remove_it)
        removed = time.monotonic()
        await eventually_async(lambda: pools_of(cluster) == ["here"], 120)
        took_s = time.monotonic() - removed
        if in_vain is None:
            await asyncio.sleep(3)
        else:
            long, waiting = in_vain
            await check_told_at_last(cluster, long, waiting, removed)
    print(f"\n| worker node removed | {told(clients.answers)} | {took_s:.1f} s |")
    assert set(clients.outcomes()) <= {COMPLETE, CUT}
    assert len(clients.answers) - len(clients.complete()) <= clients.count
    assert len(engines()) == 1, "an engine outlived its node"
    print(await asyncio.to_thread(check_bill, cluster, clients.answers))
