"""Ray's own autoscaler adds and removes nodes while the policy asks for replicas.

`ray.cluster_utils.AutoscalingCluster` cannot be used: it ends every process of Ray on the machine,
and reads a file that Ray's wheels lack. The provider of nodes is the same.
"""

import asyncio
import re
from contextlib import suppress

import pytest

from tests.support.cluster import eventually_async, pooled_app
from tests.support.late_nodes import LATE_S, scaling_config
from tests.support.machines import namespaces_work
from tests.support.ray_machines import FRONT, front_ingress, ray_machines

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not namespaces_work(), reason="users may not make namespaces here"),
]

NEEDED, MOST, SLOTS, CLIENTS = 2, 4, 4, 5
"""The clients take 5 of 8 slots: too many for one replica, and far too few for a third, also where
a busy machine makes requests seem more or longer than they are."""
BOUNDS = {"min_replicas": 1, "max_replicas": MOST, "upscale_delay_s": 0, "downscale_delay_s": 0}
QUICK = {
    "scale_down_after_s": 3,
    "smoothing_s": 5,
    "priority_wait_probability": 0.9,
    "priority_memory_s": 0,
}
DECISION = re.compile(r"late is scaled: pool (\d) -> (\d).*?(?:; a start takes (\d+) s)?$", re.M)


def late_app():
    """A model whose replicas each need a node of their own, one that Ray's autoscaler adds."""
    pools = {"pool": {"autoscaling": BOUNDS, "slots": SLOTS, "tokens_per_second": 20}}
    app = pooled_app("late", pools, {"scaling": QUICK})
    app["autoscaling_policy"] = {"policy_function": "app.autoscaling:priority_aware"}
    model, pool = app["deployments"]
    model["ray_actor_options"] = {"num_cpus": 0, "resources": FRONT}
    pool["ray_actor_options"] = {"num_cpus": 0, "resources": {"seat": 1}}
    return app


def decisions(cluster):
    """Each change of the replicas in the controller's log: from, to, how long a start takes."""
    found = DECISION.findall(cluster.log(cluster.head, "serve/controller_*.log"))
    return [(int(before), int(after), int(start_s or 0)) for before, after, start_s in found]


async def keep_asking(client, stop):
    while not stop.is_set():
        answer = await client.chat.completions.create(
            model="late",
            messages=[{"role": "user", "content": "hello"}],
            service_tier="priority",
            max_tokens=20,
        )
        assert answer.service_tier == "priority"


async def test_nodes_come_late_and_go_with_the_replicas():
    # More nodes and replicas than are needed: an order too many would be seen.
    with ray_machines(scaling_config(MOST, seat=1)) as cluster:
        assert cluster.added() == {}
        await asyncio.to_thread(cluster.deploy, front_ingress(), late_app())
        frames = []

        def serving(replicas):
            with suppress(AssertionError):  # before Serve has the model
                frames.append(cluster.frame("late"))
            return bool(frames) and len(frames[-1]["replicas"]) == replicas

        await eventually_async(lambda: serving(1), 120)
        await asyncio.to_thread(cluster.wait_ready, cluster.head, "late")
        first, stop = len(frames), asyncio.Event()
        async with cluster.client(cluster.head) as client, asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(keep_asking(client, stop))
            try:
                await eventually_async(lambda: serving(NEEDED), 120)
                ordered, nodes = decisions(cluster), await asyncio.to_thread(cluster.added)
            finally:
                stop.set()
        assert [order[:2] for order in ordered] == [(1, NEEDED)], "none is ordered twice"
        assert list(nodes.values()) == [True] * NEEDED, "a node for each replica"
        for waiting in (frames[:first], frames[first:]):
            assert len(waiting) > 1, "it waited for a node"
        assert all(frame["failed"] == frame["missing"] == {} for frame in frames)
        # Nodes go once nobody needs them.
        await eventually_async(lambda: sum(cluster.added().values()) == 1, 120)
        assert await asyncio.to_thread(serving, 1)
        ordered = decisions(cluster)
        assert len(await asyncio.to_thread(cluster.added)) == max(after for _, after, _ in ordered)
        (*_, engine_s), (*_, with_node_s) = ordered[0], ordered[-1]
        print(f"a start takes {engine_s} s by the engine, and {with_node_s} s with its node")
        assert with_node_s > LATE_S and with_node_s > engine_s, "it contains the node's coming"
