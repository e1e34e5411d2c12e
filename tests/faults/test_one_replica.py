"""The failure matrix with a single engine replica and a single ingress: nobody is stuck.

Where there is nothing to move a request to, its client gets an error that says so at once, and is
served again as soon as there is an engine.
"""

import asyncio
import time
from contextlib import asynccontextmanager
from functools import partial

import pytest

from tests.faults.clients import COMPLETE, CUT, REFUSED, TRUNCATED, Clients, check_bill, told
from tests.faults.engines import change_engine, one_replaced, replica_ids
from tests.support.cluster import (
    actors_titled,
    command_line,
    engine_processes,
    eventually,
    eventually_async,
    ingress_app,
    ingress_processes,
    running_ingresses,
    simulated_app,
)

CLIENTS = 4
STREAM_TIMEOUT_S = 3
PROBE_TIMEOUT_S = 4
MAX_WAIT_S = 60
NO_ENGINE = "503 engine_not_ready"

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def single(cluster):
    journal = {"folder": "${FRONTLINE_TEST_LEDGER}/journal", "adopt_interval_s": 1}
    cluster.deploy(
        ingress_app(
            journal=journal,
            stream_timeout_s=STREAM_TIMEOUT_S,
            engine_timeout_s=STREAM_TIMEOUT_S,
        ),
        simulated_app(
            "single",
            settings={"queue": {"default": {"max_wait_s": MAX_WAIT_S}}},
            tokens_per_second=60,
            health_timeout_s=5,
            probe_timeout_s=PROBE_TIMEOUT_S,
        ),
    )
    cluster.wait_ready("single", timeout_s=90)
    eventually(lambda: recovered(cluster), 90, "not ready")
    yield cluster
    cluster.remove("single")
    cluster.restore_ingress()


def recovered(cluster):
    one_ingress = running_ingresses() == 1 and len(cluster.board("single").ingresses) == 1
    return one_ingress and cluster.serves("single") and len(cluster.replicas("single")) == 1


@asynccontextmanager
async def under_load(cluster, what, *, seen):
    """Clients ask while the block makes something fail, and until all is well again.

    They may see answers, and besides only what is ``seen``; each answer is on the bill once. One
    that is stuck gets neither: its request is shed with 429 when it has waited for ``MAX_WAIT_S``.
    """
    clients = Clients(cluster, "single", count=CLIENTS)
    async with clients.asking():
        await asyncio.sleep(1)
        failed = time.monotonic()
        yield
        await eventually_async(lambda: recovered(cluster), 60)
        took_s = time.monotonic() - failed
        back = time.monotonic()
        # A client asks anew only when it has got its answer: nobody is held by what was lost.
        await eventually_async(lambda: clients.served(since=back), MAX_WAIT_S + 30)
    print(f"\n| one replica: {what} | {told(clients.answers)} | {took_s:.1f} s |")
    assert set(clients.outcomes()) <= {COMPLETE, *seen}
    await asyncio.to_thread(check_bill, cluster, clients.answers)


simulate = partial(change_engine, model="single")
ids = partial(replica_ids, model="single")
replaced = partial(one_replaced, model="single")


@pytest.mark.parametrize(
    ("what", "tokens"),
    [("engine crashes before the first byte", 0), ("engine crashes in mid-answer", 5)],
)
async def test_an_engine_crashes(single, what, tokens):
    async with under_load(single, what, seen={CUT, NO_ENGINE}):
        before = ids(single)
        await simulate(single, failures={"request": "crash", "after_tokens": tokens})
        await replaced(single, before)


async def test_an_engine_takes_requests_and_never_answers_them(single):
    async with under_load(single, "engine takes requests, never answers", seen={CUT, NO_ENGINE}):
        before = ids(single)
        await simulate(single, failures={"request": "hang"})
        await replaced(single, before)


async def test_an_engine_stops_altogether(single):
    async with under_load(single, "engine stopped (SIGSTOP)", seen={CUT, NO_ENGINE}):
        before = ids(single)
        words = ((process, command_line(process)) for process in engine_processes())
        [engine] = [
            process
            for process, line in words
            if "test/single" in line and "--port" in line and "reaper" not in " ".join(line)
        ]
        engine.suspend()
        await replaced(single, before)


async def test_an_engine_replicas_actor_is_killed(single):
    async with under_load(single, "EngineReplica killed (SIGKILL)", seen={CUT, NO_ENGINE}):
        before = ids(single)
        actors_titled("ray::ServeReplica:single:simulated")[0].kill()
        await replaced(single, before)


async def test_the_ingress_is_killed(single):
    # Until another runs HAProxy answers, in OpenAI's shape.
    seen = {TRUNCATED, REFUSED, "502 internal_error", "503 ingress_not_ready", NO_ENGINE}
    async with under_load(single, "the only ingress killed (SIGKILL)", seen=seen):
        [victim] = ingress_processes()
        victim.kill()
        await eventually_async(
            lambda: {process.pid for process in ingress_processes()} - {victim.pid}, 60
        )
