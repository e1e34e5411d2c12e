"""Real vLLM with its tensors spread over two nodes of a cluster, behind Frontline."""

import os
import time
from pathlib import Path

import openai
import psutil
import pytest

from app.core.paths import frontline_home
from tests.engines.padded import pad_heads
from tests.support.cluster import eventually_async
from tests.support.machines import namespaces_work
from tests.support.ray_machines import FRONT, front_ingress, ray_machines

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not namespaces_work(), reason="users may not make namespaces here"),
]

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
MODEL = "smollm2-135m-instruct"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Without a warm-up, which the processors of one machine would take turns at.
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # A machine's name leads elsewhere.
    "GLOO_SOCKET_IFNAME": "eth0",
}
FRANCE = {
    "model": "wide",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


def wide(model: Path):
    """An application whose engine takes two nodes."""
    pool = {
        "name": "vllm",
        "engine": "vllm",
        "model": str(model),
        "python": str(frontline_home() / "envs" / "vllm-cpu" / "bin" / "python"),
        "slots": 4,
        "nodes": 2,
        "engine_args": {
            "tensor_parallel_size": 2,
            "enforce_eager": True,
            "max_model_len": 2048,
        },
        "environment": ENVIRONMENT,
        "stop_grace_s": 5,
        # Two cores, shared by everything that starts.
        "health_timeout_s": 20,
    }
    return {
        "name": "wide",
        "route_prefix": None,
        "import_path": "deployments.model:build",
        "args": {"id": "test/wide", "aliases": ["wide"], "pools": [pool]},
        "deployments": [
            {"name": "Model", "ray_actor_options": {"num_cpus": 0, "resources": FRONT}},
            {
                "name": "vllm",
                "ray_actor_options": {"num_cpus": 0, "resources": {"wide": 1}},
                "placement_group_bundles": [{"wide": 1}, {"wide": 1}],
                "placement_group_strategy": "STRICT_SPREAD",
            },
        ],
    }


@pytest.fixture(scope="module")
def cluster():
    with ray_machines() as cluster:
        cluster.front, cluster.engines_node = cluster.join_all(
            n2={"front": 1, "wide": 1}, n3={"wide": 1}
        )
        model = cluster.folder / "padded"
        pad_heads(frontline_home() / "models" / MODEL, model, heads=12, of_keys=4)
        cluster.deploy(front_ingress(), wide(model))
        began = time.monotonic()
        cluster.wait_ready(cluster.front, "wide", timeout_s=600)
        print(f"vLLM on two nodes after {time.monotonic() - began:.1f} s")
        yield cluster


def processes(machine):
    """The processes of the engine on a machine, and how each was started."""
    here = os.readlink(f"/proc/{machine.pid}/ns/net")
    found = {}
    for process in psutil.process_iter():
        try:
            inside = os.readlink(f"/proc/{process.pid}/ns/net") == here
            if inside and "VLLM_HOST_IP" in process.environ():
                found[process.pid] = process.cmdline()
        except (psutil.Error, OSError):
            continue
    return found


def parts(cluster):
    """Both parts' processes; first those on the node with the server."""
    found = [processes(node) for node in (cluster.front, cluster.engines_node)]
    return sorted(found, key=lambda one: any("--headless" in words for words in one.values()))


async def test_two_parts_answer_as_one_model(cluster):
    first, other = parts(cluster)
    assert ["VLLM::Worker_TP0"] in [words[:1] for words in first.values()]
    assert ["VLLM::Worker_TP1"] in [words[:1] for words in other.values()]
    assert any("--headless" in words for words in other.values())
    async with cluster.client(cluster.front) as client:
        answer = await client.chat.completions.create(
            **FRANCE, max_tokens=24, service_tier="priority"
        )
        assert "Paris" in answer.choices[0].message.content
        assert answer.service_tier == "priority"
        stream = await client.chat.completions.create(**FRANCE, max_tokens=24, stream=True)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert said == answer.choices[0].message.content


async def test_the_loss_of_one_part_is_the_loss_of_the_engine(cluster):
    before = parts(cluster)
    [worker] = [pid for pid, words in before[1].items() if words[:1] == ["VLLM::Worker_TP1"]]
    async with cluster.client(cluster.front) as client:
        stream = await client.chat.completions.create(
            **{**FRANCE, "messages": [{"role": "user", "content": "Tell me a long story."}]},
            max_tokens=1500,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with pytest.raises(openai.APIError):
            async for chunk in stream:
                if worker and chunk.choices[0].delta.content:
                    psutil.Process(worker).kill()
                    worker = None
        assert worker is None
    began, old = time.monotonic(), {*before[0], *before[1]}

    def replaced():
        now = parts(cluster)
        return all(now) and not old & {*now[0], *now[1]}

    # Nothing of the old one is left, on either node, and both parts have been started anew.
    await eventually_async(replaced, 60)
    print(f"both parts started anew after {time.monotonic() - began:.1f} s")
    if LONG:
        await eventually_async(lambda: cluster.models(cluster.front).get("wide"), 300)
        print(f"served again after {time.monotonic() - began:.1f} s")
