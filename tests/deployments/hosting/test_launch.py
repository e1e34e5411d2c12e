"""What an engine inherits of its replica's environment."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from app.config.model import PoolSettings
from app.core.settings import SettingsError
from deployments.engines.base import NodeSpan
from deployments.engines.registry import adapter_named
from deployments.engines.simulated import Simulated
from deployments.hosting import launch
from deployments.model import build

pytestmark = pytest.mark.unit


PROGRAM = """
import json, os
names = ("OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "CUDA_VISIBLE_DEVICES")
print(json.dumps({name: os.environ[name] for name in names if name in os.environ}))
"""


class Printing(Simulated):
    def command(self, launch):
        return [sys.executable, "-S", "-c", PROGRAM]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MALLOC_ARENA_MAX"])
def test_what_is_set_for_rays_own_processes_is_not_the_engines(tmp_path, monkeypatch, name):
    monkeypatch.setattr(launch, "log_folder", lambda: tmp_path)
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = started()
    assert name not in seen
    assert seen["CUDA_VISIBLE_DEVICES"] == "3"
    assert started(environment={name: "7"})[name] == "7"


def started(**settings):
    """Start an engine that prints what it has of these in its environment, and return that."""
    pool = PoolSettings(name="pool", engine="simulated", model="simulated", slots=1, **settings)
    made = launch.make_launch("model", pool, host="127.0.0.1", port=1)

    async def run():
        engine = await launch.start_engine(Printing(), made, pool)
        await engine.wait()
        return json.loads(engine.tail())

    return asyncio.run(run())


@pytest.mark.parametrize("engine", ["vllm", "sglang", "simulated"])
def test_modules_of_images_and_operators_come_after_frontlines(monkeypatch, engine):
    """Which replaced them before: an image that sets PYTHONPATH lost its modules."""

    def path(inherited, **environment):
        pool = PoolSettings(name="pool", engine=engine, model="m", environment=environment)
        made = launch.make_launch("model", pool, host="127.0.0.1", port=1)
        adapter = adapter_named(engine)
        found = launch.environment(adapter, made, pool, {"PYTHONPATH": inherited})
        own = adapter.environment(made)["PYTHONPATH"]
        assert found["PYTHONPATH"].startswith(own)
        return found["PYTHONPATH"].removeprefix(own)

    root = str(Path(launch.__file__).parents[2])
    assert path("/image") == ":/image"
    assert path(f"{root}:/image:") == ":/image", "Frontline's own modules are not the engine's"
    assert path("/image", PYTHONPATH="/own") == ":/own"
    assert path("") == ""


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt_llm"])
def test_the_parts_of_an_engine_on_one_node_meet_on_loopback(engine):
    def interfaces(**settings):
        pool = PoolSettings(name="pool", engine=engine, model="m", **settings)
        span = NodeSpan(2, 0, "10.0.0.1", "10.0.0.1", 1) if pool.nodes > 1 else NodeSpan()
        made = launch.make_launch("model", pool, host="127.0.0.1", port=1, span=span)
        found = launch.environment(adapter_named(engine), made, pool)
        return found.get("NCCL_SOCKET_IFNAME"), found.get("GLOO_SOCKET_IFNAME")

    assert interfaces() == ("lo", "lo")
    assert interfaces(nodes=2) == (None, None)
    assert interfaces(environment={"NCCL_SOCKET_IFNAME": "eth1"}) == ("eth1", "lo")


RESERVED = [
    ("vllm", "VLLM_USE_RUST_FRONTEND"),
    ("vllm", "VLLM_API_KEY"),
    ("vllm", "FRONTLINE_ENGINE_KEY"),
    ("sglang", "SGLANG_HTTP_SERVER_APP_PATH"),
    ("tensorrt_llm", "FRONTLINE_ENGINE_CONFIG"),
]


@pytest.mark.parametrize(("engine", "name"), RESERVED)
def test_a_pool_cannot_set_what_would_take_away_key_or_proof(engine, name):
    """410afd7 accepted all of them: the pool's value replaced Frontline's."""
    pool = {"name": "pool", "engine": engine, "model": "m", "environment": {name: "1"}}
    with pytest.raises(SettingsError) as error:
        build({"id": "org/m", "pools": [pool]})
    assert str(error.value) == f"args.pools.0.environment.{name}: Frontline sets this itself"


def test_vllms_frontend_that_loads_no_middleware_is_off_whatever_is_inherited(monkeypatch):
    pool = PoolSettings(name="pool", engine="vllm", model="m")
    made = launch.make_launch("model", pool, host="127.0.0.1", port=1)
    found = launch.environment(adapter_named("vllm"), made, pool, {"VLLM_USE_RUST_FRONTEND": "1"})
    assert found["VLLM_USE_RUST_FRONTEND"] == "0"
