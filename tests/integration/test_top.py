"""`frontline top`, run as its user runs it, against the live cluster."""

import asyncio
import json
import os
import subprocess
import sys

import openai
import pytest
import ray
from ray import serve

from app.core.tiers import Tier
from tests.support.cluster import eventually_async, simulated_app
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.integration

SLOTS = 4


@pytest.fixture
def model(frontline):
    """Three slots for all and one for priority, an engine too slow to end, and a short line."""
    line = {"default": {"max_waiting": 2}, "flex": {"max_waiting": 0}, "headroom": 0.25}
    frontline.deploy(
        simulated_app(
            "watched",
            settings={"queue": line},
            slots=SLOTS,
            tokens_per_second=2,
            preemption=False,
        )
    )
    frontline.wait_ready("watched")
    yield frontline
    frontline.remove("watched")


def top(*options):
    """Run it in a terminal of its own: nothing is inherited from the process with the cluster."""
    # Ray sets it where a cluster is started by `ray.init`, and RAY_ADDRESS in its children.
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "top", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def top_json():
    address = ray.get_runtime_context().gcs_address
    ended = top("--once", "--json", "--address", address)
    assert (ended.returncode, ended.stderr) == (0, "")
    frame = json.loads(ended.stdout)
    assert frame["address"] == address
    return {one["application"]: one for one in frame["models"]}


async def ask(client, tier, **more):
    try:
        await client.chat.completions.create(
            model="watched",
            messages=[{"role": "user", "content": "hello"}],
            service_tier=tier,
            max_tokens=1000,
            **more,
        )
    except openai.RateLimitError as error:
        return error.response.headers["x-shed-reason"]
    return "served"


def told(what):
    """What the only ingress has told the Model by now, as ``what`` reads it from its demand."""
    handle = serve.get_deployment_handle("Model", app_name="watched")
    boards = handle.board.remote().result(timeout_s=PATIENCE_S).ingresses
    return what(boards[0].demand) if boards else None


async def start(client, tier, *, running, waiting):
    """Ask so many times that so many run and wait, and return once the Model knows."""
    tasks = [asyncio.create_task(ask(client, tier)) for _ in range(running + waiting)]
    wanted = (running, waiting)
    await eventually_async(lambda: told(lambda d: (d.running[tier], d.waiting[tier])) == wanted)
    return tasks


async def test_it_shows_who_runs_who_waits_and_who_was_turned_away(model):
    async with model.async_client() as client:
        await eventually_async(lambda: told(lambda d: sum(c for c, _ in d.held.values())) == SLOTS)
        asked = await start(client, Tier.DEFAULT, running=3, waiting=2)
        asked += await start(client, Tier.PRIORITY, running=1, waiting=1)
        assert await ask(client, "default") == "queue_full"
        assert await ask(client, "default") == "queue_full"
        assert await ask(client, "flex", extra_body={"fail_fast": True}) == "fail_fast"
        # The next report tells of them.
        await asyncio.sleep(1.5)
        models = await asyncio.to_thread(top_json)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    watched = models["watched"]
    assert (watched["id"], watched["state"]) == ("test/watched", "RUNNING")
    assert (watched["slots"], watched["credits"], watched["headroom"]) == (SLOTS, SLOTS, 1)
    priority, default, flex = (watched["tiers"][t] for t in ("priority", "default", "flex"))
    assert (priority["running"], priority["waiting"], priority["sheds"]) == (1, 1, {})
    assert (default["running"], default["waiting"]) == (3, 2)
    assert default["sheds"]["queue_full"] == {"total": 2, "per_s": 0.0}
    assert (flex["running"], flex["waiting"]) == (0, 0)
    assert flex["sheds"]["fail_fast"]["total"] == 1
    assert default["oldest_s"] > priority["oldest_s"] > 1
    assert default["grants_per_s"] > priority["grants_per_s"] > flex["grants_per_s"] == 0
    [replica] = watched["replicas"]
    assert (replica["pool"], replica["native_priority"]) == ("simulated", True)
    assert (replica["running"], replica["slots"], replica["credits"]) == (SLOTS, SLOTS, SLOTS)
    [ingress] = watched["ingresses"]
    assert (ingress["running"], ingress["waiting"]) == (4, 3)
    assert models["fcfs"]["replicas"][0]["native_priority"] is False


def test_it_shows_every_model_in_a_terminal(frontline):
    ended = top("--once", "--address", ray.get_runtime_context().gcs_address)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "test/native" in ended.stdout and "test/fcfs" in ended.stdout


def test_the_engines_keys_are_not_shown(frontline):
    key = frontline.snapshot("native").replicas[0].key
    address = ray.get_runtime_context().gcs_address
    assert key and key not in top("--json", "--address", address).stdout


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_without_a_cluster_it_says_so_in_one_line(address):
    ended = top("--once", "--address", address)
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"frontline top: cannot connect to a Ray cluster at {address}")
