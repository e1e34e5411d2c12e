"""LoRA adapters that are loaded into running engines, and unloaded, by another config file.

Through the whole of Frontline: real vLLM, real SGLang, and the simulated engine in both dialects.
"""

import copy
import os
import signal
from contextlib import suppress

import httpx
import openai
import pytest

from app.core.paths import expand_path
from tests.engines.lora import make_lora
from tests.engines.pools import SGLANG, pool_of
from tests.support.cluster import command_line, engine_processes, eventually, ingress_app

pytestmark = pytest.mark.timeout(560)

MODEL, FIRST, BROKEN = "changing", "tuned/first", "tuned/broken"
PRICES = {"input": 3, "output": 7}
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
ROOM = {"adapter_room": 2, "adapter_rank": 8}
SIMULATED = {"engine": "simulated", "model": "simulated", "slots": 4, "stop_grace_s": 1}

PINNING_FREE = '''"""torch without pinned memory, which SGLang's LoRA asks for: a CPU has none."""
import torch

for name in ("tensor", "empty", "zeros", "ones", "full", "empty_like"):
    def made(*given, _make=getattr(torch, name), pin_memory=False, **named):
        return _make(*given, **named)
    setattr(torch, name, made)
torch.Tensor.pin_memory = lambda self, *given, **named: self
'''


def simulated(dialect):
    args = {"dialect": dialect, "tokens_per_second": 20}
    return lambda folder: {**SIMULATED, "engine_args": args}


def vllm(folder):
    return pool_of("local.yaml", "smollm2", "vllm")


def sglang(folder):
    (folder / "sitecustomize.py").write_text(PINNING_FREE)
    pool = copy.deepcopy(SGLANG)
    pool["engine_args"]["lora_backend"] = "torch_native"
    pool["environment"]["PYTHONPATH"] = str(folder)
    return pool


def adapter_folder(folder, pool):
    """An adapter that its engine can load: of random weights, if it is a real engine."""
    if pool["engine"] == "simulated":
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    else:
        make_lora(folder, expand_path(pool["model"]), expand_path(pool["python"]))


def app(pool, *adapters):
    """The model with these adapters; nothing else in it changes."""
    cards = dict.fromkeys((name for name, _ in adapters), PRICES)
    settings = {
        "rate_card": {"input": 1, "output": 2},
        "adapter_rate_cards": cards,
        "adapters": [{"name": name, "path": str(path)} for name, path in adapters],
    }
    return {
        "name": MODEL,
        "route_prefix": None,
        "import_path": "deployments.model:build",
        "args": {"id": f"test/{MODEL}", "aliases": [MODEL], "pools": [{**pool, **ROOM}]},
        "deployments": [
            {"name": "Model", "user_config": settings},
            {"name": pool["name"], "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}},
        ],
    }


@pytest.fixture(
    params=[
        pytest.param(simulated("vllm"), id="simulated-vllm", marks=pytest.mark.integration),
        pytest.param(simulated("sglang"), id="simulated-sglang", marks=pytest.mark.integration),
        pytest.param(vllm, id="vllm", marks=pytest.mark.engine),
        pytest.param(sglang, id="sglang", marks=pytest.mark.engine),
    ]
)
def pool(request, tmp_path, cluster):
    yield {**request.param(tmp_path), "name": "changing"}
    cluster.remove(MODEL)


def status_of(cluster, model):
    """The status of a short request; 200 if it is answered."""
    try:
        cluster.client().chat.completions.create(model=model, max_tokens=1, **ASK)
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def answer(cluster, model):
    asked = {"max_tokens": 12, "temperature": 0, **ASK}
    return cluster.client().chat.completions.create(model=model, **asked)


def listed(cluster):
    with cluster.engine(MODEL) as engine:
        return {one["id"] for one in engine.get("/v1/models").json()["data"]}


def test_adapters_come_and_go_while_the_engine_runs(cluster, pool, tmp_path):
    folder = tmp_path / "first"
    adapter_folder(folder, pool)
    cluster.deploy(ingress_app(), app(pool))
    cluster.wait_ready(MODEL, timeout_s=300)
    [replica] = cluster.replicas(MODEL)
    assert status_of(cluster, FIRST) == 404

    # One that is there, and one that is not.
    cluster.deploy(app(pool, (FIRST, folder), (BROKEN, tmp_path / "nowhere")))
    eventually(lambda: status_of(cluster, FIRST) == 200, 60, "the adapter was not loaded")
    told = answer(cluster, FIRST)
    usage = told.usage
    cost = (
        usage.prompt_tokens * PRICES["input"] + usage.completion_tokens * PRICES["output"]
    ) / 1e6
    assert (told.model, usage.estimated_cost) == (FIRST, pytest.approx(cost, rel=1e-9))
    base = answer(cluster, MODEL)
    if pool["engine"] != "simulated":
        assert "Paris" in base.choices[0].message.content
        assert told.choices[0].message.content != base.choices[0].message.content
    assert status_of(cluster, BROKEN) == 503
    [now] = cluster.replicas(MODEL)
    assert now.replica_id == replica.replica_id, "nothing was restarted"
    first, broken = now.adapters
    assert (first.loaded, broken.loaded) == (True, False) and broken.why_not
    assert cluster.entry(FIRST)["parent"] == f"test/{MODEL}"
    assert str(tmp_path) not in str(cluster.entry(BROKEN))

    # The engine's routes that did this are nobody else's.
    with cluster.http() as http, httpx.Client(base_url=now.base_url) as keyless:
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            assert http.post(path, json={}).status_code in (404, 405)
            assert keyless.post(path, json={}).status_code in (401, 403)

    # A request that runs while its adapter is removed ends as if nothing had happened.
    stream = cluster.client().chat.completions.create(
        model=FIRST, max_tokens=120, stream=True, extra_body={"ignore_eos": True}, **ASK
    )
    next(stream)
    cluster.deploy(app(pool))
    eventually(lambda: status_of(cluster, FIRST) == 404, 30, "the adapter is still served")
    ends = [choice.finish_reason for chunk in stream for choice in chunk.choices]
    assert ends[-1] == "length"
    assert status_of(cluster, MODEL) == 200
    eventually(lambda: FIRST not in listed(cluster), 60, "the engine still has the adapter")
    assert [one.replica_id for one in cluster.replicas(MODEL)] == [replica.replica_id]

    # An engine that is started anew has what is in force before it gets its first request.
    cluster.deploy(app(pool, (FIRST, folder)))
    eventually(lambda: status_of(cluster, FIRST) == 200, 60, "the adapter was not loaded again")
    port = now.base_url.rsplit(":", 1)[1]
    # All of them are found before the first is killed, which may end others.
    killed = [one.pid for one in engine_processes() if port in command_line(one)]
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def another():
        return [one for one in cluster.replicas(MODEL) if one.replica_id != replica.replica_id]

    [restarted] = eventually(another, 300, "the engine was not started anew")
    assert FIRST in restarted.dialect.adapters
    assert answer(cluster, FIRST).choices[0].message.content == told.choices[0].message.content
