"""Frontline on a Ray cluster of several machines: engines here, ingresses there."""

import asyncio
import os
import re
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress

import openai
import psutil
import pytest

from tests.support.cluster import eventually_async, simulated_app
from tests.support.machines import namespaces_work
from tests.support.ray_machines import FRONT, front_ingress, ray_machines

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not namespaces_work(), reason="users may not make namespaces here"),
]

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
LONG_FORM = [
    pytest.mark.faults,
    pytest.mark.skipif(not LONG, reason="in the long form only"),
]
CLIENTS = 4
TOKENS_PER_S = 100


def placed(app, **resources):
    """A model's application whose engines are where these resources are."""
    for deployment in app["deployments"]:
        where = FRONT if deployment["name"] == "Model" else resources
        deployment["ray_actor_options"] = {"num_cpus": 0, "resources": where}
    for pool in app["args"]["pools"]:
        pool["stop_grace_s"] = 20
    return app


INGRESS = front_ingress()
ON_VLLM = placed(simulated_app("one", tokens_per_second=TOKENS_PER_S), engine_vllm=1)
ON_SGLANG = placed(
    simulated_app("two", dialect="sglang", tokens_per_second=TOKENS_PER_S), engine_sglang=1
)
ADDED = placed(simulated_app("added", tokens_per_second=TOKENS_PER_S), engine_vllm=1)

WIDE = placed(simulated_app("wide"), wide=1)
WIDE["args"]["pools"][0]["nodes"] = 2
WIDE["deployments"][1] |= {
    "placement_group_bundles": [{"wide": 1}, {"wide": 1}],
    "placement_group_strategy": "STRICT_SPREAD",
}


@pytest.fixture(scope="module")
def cluster():
    with ray_machines() as cluster:
        cluster.front, cluster.engines_node = cluster.join_all(
            n2={"front": 1, "engine_sglang": 1, "wide": 1}, n3={"engine_vllm": 3, "wide": 1}
        )
        cluster.deploy(INGRESS, ON_VLLM, ON_SGLANG)
        cluster.wait_ready(cluster.front, "one", "two")
        yield cluster


async def ask(client, model, number):
    request = {
        "model": model,
        "messages": [{"role": "user", "content": f"question {number}"}],
        "max_tokens": 30,
        "service_tier": "priority",
    }
    if number % 2:
        answer = await client.chat.completions.create(**request)
        assert answer.service_tier == "priority" and answer.usage.completion_tokens
        return
    chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **request)]
    assert chunks[-1].service_tier == "priority"
    assert any(choice.finish_reason for chunk in chunks for choice in chunk.choices)


async def stream_long(cluster, model, seconds, began):
    """A stream that takes so long, to its end; ``began`` is set with its first event."""
    request = {"model": model, "messages": [{"role": "user", "content": "a long story"}]}
    asked = {**request, "max_tokens": seconds * TOKENS_PER_S, "stream": True}
    async with cluster.client(cluster.front) as client:
        stream = await client.chat.completions.create(
            **asked, stream_options={"include_usage": True}
        )
        chunks = [await anext(stream)]
        began.set()
        chunks += [chunk async for chunk in stream]
    assert chunks[-1].usage.completion_tokens == seconds * TOKENS_PER_S


@asynccontextmanager
async def load(cluster, *models):
    """Clients that go on asking; what they got, by model, and every failure."""
    ended, answered, failures = asyncio.Event(), Counter(), []

    async def one(first):
        async with cluster.client(cluster.front) as client:
            number = first
            while not ended.is_set():
                number += CLIENTS
                model = models[number // 2 % len(models)]
                try:
                    await ask(client, model, number)
                    answered[model] += 1
                    # What starts meanwhile needs the machine too.
                    await asyncio.sleep(0.3)
                except Exception as error:  # whatever it is, a client has seen it
                    failures.append((model, time.strftime("%X"), repr(error)))
                    await asyncio.sleep(0.2)

    tasks = [asyncio.create_task(one(first)) for first in range(CLIENTS)]
    try:
        yield answered, failures
    finally:
        ended.set()
        await asyncio.gather(*tasks)
    print(f"answered {dict(answered)}, failed {len(failures)}")


def test_models_are_where_their_engines_are(cluster):
    assert set(cluster.engines(cluster.engines_node).values()) == {"test/one"}
    assert set(cluster.engines(cluster.front).values()) == {"test/two"}
    assert not cluster.engines(cluster.head)


def test_no_engine_is_reachable_from_another_machine_but_through_its_guard(cluster):
    node = cluster.engines_node
    listening = node.run("ss", "-Htlnp")
    haproxies = Counter(re.findall(r"(\S+):(\d+)\s.*haproxy", listening))
    (pid,) = cluster.engines(node)
    words = psutil.Process(pid).cmdline()
    engine_port = words[words.index("--port") + 1]
    (guard,) = [port for host, port in haproxies if host == node.address]
    asked = ["curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}"]
    url = f"http://{node.address}"
    assert cluster.front.run(*asked, f"{url}:{guard}/v1/models") == "403"
    assert cluster.front.run(*asked, "-X", "POST", f"{url}:{guard}/v1/chat/completions") == "403"
    with pytest.raises(AssertionError, match=r"Failed to connect|Could not connect"):
        cluster.front.run(*asked, f"{url}:{engine_port}/health")


def guards(node):
    """The guards of a node's engines, by the engine's port."""
    found = {}
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != "haproxy":
            continue
        with suppress(psutil.Error):  # it has just ended
            variables = process.environ()
            if variables.get("FRONTLINE_GUARD_ADDRESS", "").startswith(f"{node.address}:"):
                found[variables["FRONTLINE_GUARD_ENGINE_PORT"]] = process
    return found


async def test_a_guard_that_dies_is_replaced_with_its_engine(cluster):
    node = cluster.engines_node
    (engine,) = cluster.engines(node)
    ((_, guard),) = guards(node).items()
    async with load(cluster, "two") as (answered, failures):
        began = asyncio.Event()
        stream = asyncio.create_task(stream_long(cluster, "one", 30, began))
        await began.wait()
        guard.kill()
        killed = time.monotonic()
        with pytest.raises(openai.APIError):
            await stream
        await eventually_async(lambda: {*cluster.engines(node)} - {engine}, 60)
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two")
        print(f"replaced after {time.monotonic() - killed:.1f} s")
        async with cluster.client(cluster.front) as client:
            await ask(client, "one", 1)
    assert not failures and answered["two"]
    await eventually_async(lambda: not psutil.pid_exists(engine))
    assert len(guards(node)) == len(cluster.engines(node)) == 1


def test_no_replica_listens_for_other_deployments_on_every_address(cluster):
    row = r'(\S+):\d+\s+\S+\s+users:\(\("ray::ServeRepli",pid=(\d+)'
    for node in (cluster.front, cluster.engines_node):
        found = re.findall(row, node.run("ss", "-Htlnp"))
        pids = {pid for _, pid in found}
        assert pids
        for pid in pids:
            grpc = Counter(address for address, one in found if one == pid and address != "0.0.0.0")
            # Ray's own, which asks for its token; and Serve's.
            assert grpc == Counter(["*", "[::ffff:127.0.0.1]"])


async def test_a_model_is_added_changed_and_removed_under_load(cluster):
    before = cluster.engines(cluster.engines_node) | cluster.engines(cluster.front)
    async with load(cluster, "one", "two") as (answered, failures):
        await asyncio.to_thread(cluster.deploy, INGRESS, ON_VLLM, ON_SGLANG, ADDED)
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two", "added")
        async with cluster.client(cluster.front) as client:
            await ask(client, "added", 1)
        changed = {**ADDED, "args": {**ADDED["args"], "aliases": ["changed"]}}
        await asyncio.to_thread(cluster.deploy, INGRESS, ON_VLLM, ON_SGLANG, changed)
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two", "changed")
        await asyncio.to_thread(cluster.deploy, INGRESS, ON_VLLM, ON_SGLANG)
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two")
    assert not failures and all(answered[model] > 20 for model in ("one", "two"))
    now = cluster.engines(cluster.engines_node) | cluster.engines(cluster.front)
    assert before.items() <= now.items()


def parts(cluster):
    """The processes of the model whose engine runs on two nodes, by node."""
    nodes = (cluster.front, cluster.engines_node)
    found = [[pid for pid, m in cluster.engines(n).items() if m == "test/wide"] for n in nodes]
    return tuple(found[0]), tuple(found[1])


@pytest.mark.parametrize("part", ["first", pytest.param("other", marks=LONG_FORM)])
async def test_an_engine_on_two_nodes_lives_and_dies_as_one(cluster, part):
    await asyncio.to_thread(cluster.deploy, INGRESS, ON_VLLM, ON_SGLANG, WIDE)
    await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two", "wide")
    before = parts(cluster)
    assert [len(pids) for pids in before] == [1, 1]
    async with cluster.client(cluster.front) as client:
        await ask(client, "wide", 1)
        first = next(pid for (pid,) in before if psutil.Process(pid).cmdline()[-3] == "0")
        killed = first if part == "first" else next(pid for (pid,) in before if pid != first)
        psutil.Process(killed).kill()
        began = time.monotonic()

        def replaced():
            now = parts(cluster)
            return all(now) and not {*now[0], *now[1]} & {*before[0], *before[1]}

        await eventually_async(replaced, 60)
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two", "wide")
        print(f"replaced after {time.monotonic() - began:.1f} s")
        await ask(client, "wide", 1)


async def test_a_node_is_replaced_under_load_while_a_model_is_added(cluster):
    old = cluster.engines_node
    async with load(cluster, "one", "two") as (answered, failures):
        new = await asyncio.to_thread(cluster.join, 4, engine_vllm=3)
        stream = asyncio.create_task(stream_long(cluster, "one", 10, asyncio.Event()))
        await asyncio.to_thread(cluster.drain, old)
        await asyncio.to_thread(cluster.deploy, INGRESS, ON_VLLM, ON_SGLANG, ADDED)
        await eventually_async(lambda: "test/one" in cluster.engines(new).values(), 60)
        await eventually_async(lambda: not cluster.engines(old), 60)
        old.kill()
        await stream
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two", "added")
        before = answered["one"]
        await eventually_async(lambda: answered["one"] > before + 5)
    cluster.engines_node = new
    assert not failures and answered["two"] > 20
    assert "test/one" in cluster.engines(new).values()


@pytest.mark.faults
@pytest.mark.skipif(not LONG, reason="in the long form only")
async def test_the_head_node_is_replaced_under_load(cluster):
    """What runs goes on, and nobody notices; afterwards the cluster can be changed again."""
    before = cluster.engines(cluster.engines_node) | cluster.engines(cluster.front)
    async with load(cluster, "one", "two") as (answered, failures):
        await eventually_async(lambda: answered["one"] > 5)
        began = {model: asyncio.Event() for model in ("one", "two")}
        streams = [asyncio.create_task(stream_long(cluster, m, 30, began[m])) for m in began]
        await asyncio.gather(*(event.wait() for event in began.values()))
        cluster.head.kill()
        without = sum(answered.values())
        await asyncio.sleep(5)
        assert sum(answered.values()) > without + 20
        await asyncio.to_thread(cluster.start_head)
        await asyncio.gather(*streams)
        await asyncio.to_thread(cluster.deploy, INGRESS, ON_VLLM, ON_SGLANG)
        await asyncio.to_thread(cluster.wait_ready, cluster.front, "one", "two")
    assert not failures
    assert {pid for pid, model in before.items() if model != "test/added"} <= {
        *cluster.engines(cluster.engines_node),
        *cluster.engines(cluster.front),
    }
