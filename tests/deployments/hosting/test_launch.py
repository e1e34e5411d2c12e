"""What an engine inherits of its replica's environment."""

import asyncio
import json
import sys

import pytest

from app.config.model import PoolSettings
from deployments.engines.simulated import Simulated
from deployments.hosting import launch

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
