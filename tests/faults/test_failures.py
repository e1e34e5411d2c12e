"""What dies under load, and what clients see of it: the failure matrix, row by row.

The ledger's database is in test_ledger.py, what is billed when ingresses and engines are killed
again and again in test_serving.py, and what draining keeps from being cut in test_draining.py.
"""

import asyncio
import signal
import time
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

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
    simulated_app,
)
from tests.support.waiting import SLOWEST

INGRESSES = REPLICAS = 2
CLIENTS = 8
STREAM_TIMEOUT_S = 4
PROBE_TIMEOUT_S = 4

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def matrix(cluster):
    """Two ingresses and two engine replicas, each behind a network that can be cut."""
    journal = {"folder": "${FRONTLINE_TEST_LEDGER}/journal", "adopt_interval_s": 1}
    cluster.deploy(
        ingress_app(replicas=INGRESSES, journal=journal, stream_timeout_s=STREAM_TIMEOUT_S),
        simulated_app(
            "matrix",
            replicas=REPLICAS,
            tokens_per_second=60,
            python=str(Path(__file__).with_name("cuttable")),
            health_timeout_s=5,
            probe_timeout_s=PROBE_TIMEOUT_S,
        ),
    )
    eventually(lambda: recovered(cluster), 90, "not ready")
    yield cluster
    cluster.remove("matrix")
    cluster.restore_ingress()
    eventually(lambda: not engines(), 30, "an engine was left behind")


def recovered(cluster):
    """Whether everything is there again, and nothing else."""
    if not cluster.serves_everywhere("matrix"):
        return False
    board = cluster.board("matrix")
    counts = (len(board.snapshot.replicas), len(board.ingresses), len(engines()))
    return counts == (REPLICAS, INGRESSES, REPLICAS)


def engines():
    """The engines' own processes, by port; without their reapers and networks."""
    return {port: process for port, process in _by_port("-m") if port}


def networks():
    return {port: process for port, process in _by_port("cuttable") if port}


def _by_port(what):
    for process in engine_processes():
        words = command_line(process)
        if "test/matrix" not in words or "reaper" in " ".join(words):
            continue
        is_network = any(word.endswith("/cuttable") for word in words)
        if is_network == (what == "cuttable"):
            yield int(words[words.index("--port") + 1]), process


@asynccontextmanager
async def under_load(cluster, what, *, seen=frozenset(), recovers=True):
    """Clients ask while the block makes something fail, and until all is well again.

    They may see answers, and besides only what is ``seen``; each answer is on the bill once.
    """
    before = ids(cluster)
    clients = Clients(cluster, "matrix", count=CLIENTS)
    async with clients.asking():
        await asyncio.sleep(1)
        failed = time.monotonic()
        yield clients
        await eventually_async(lambda: recovered(cluster), 60)
        took_s = time.monotonic() - failed
        await asyncio.sleep(1)
    after = ids(cluster)
    print(
        f"\n| {what} | {told(clients.answers)} | {took_s:.1f} s, "
        f"{len(before - after)} replicas replaced |"
    )
    assert set(clients.outcomes()) <= {COMPLETE, *seen}
    assert len(clients.complete()) > 20
    # Whoever had no answer had one request under way when it happened.
    assert len(clients.answers) - len(clients.complete()) <= CLIENTS
    await asyncio.to_thread(check_bill, cluster, clients.answers)


simulate = partial(change_engine, model="matrix")
ids = partial(replica_ids, model="matrix")
replaced = partial(one_replaced, model="matrix")


@pytest.mark.parametrize(
    ("what", "tokens"),
    [("engine crashes before the first byte", 0), ("engine crashes in mid-answer", 5)],
)
async def test_an_engine_crashes(matrix, what, tokens):
    # What it had begun to stream is cut, and says so; all else is answered by the other engine.
    async with under_load(matrix, what, seen={CUT}):
        before = ids(matrix)
        await simulate(matrix, failures={"request": "crash", "after_tokens": tokens})
        await replaced(matrix, before)


async def test_an_engine_takes_requests_and_never_answers_them(matrix):
    what = "engine takes requests, never answers; its health route does"
    async with under_load(matrix, what) as clients:
        before = ids(matrix)
        await simulate(matrix, failures={"request": "hang"})
        await replaced(matrix, before)
    # Its own streams' patience, the probe's, three health checks; and the answer.
    slowest = max(answer.seconds for answer in clients.answers)
    assert slowest < STREAM_TIMEOUT_S + PROBE_TIMEOUT_S + SLOWEST * 20


async def test_an_engine_stops_altogether(matrix):
    async with under_load(matrix, "engine stopped (SIGSTOP): nothing answers", seen={CUT}):
        before = ids(matrix)
        process = next(iter(engines().values()))
        process.suspend()
        await replaced(matrix, before)


async def test_an_engine_is_slow(matrix):
    async with under_load(matrix, "engine at a tenth of its pace, for five seconds"):
        before = ids(matrix)
        await simulate(matrix, tokens_per_second=6)
        await asyncio.sleep(5)
        await simulate(matrix, tokens_per_second=60)
    assert ids(matrix) == before


async def test_an_engine_replicas_actor_is_killed(matrix):
    async with under_load(matrix, "EngineReplica killed (SIGKILL)", seen={CUT}):
        before, old = ids(matrix), dict(engines())
        actors_titled("ray::ServeReplica:matrix:simulated")[0].kill()
        await eventually_async(lambda: len(engines().keys() & old.keys()) == 1, 10)
        await replaced(matrix, before)


async def test_a_model_is_killed(matrix):
    async with under_load(matrix, "Model killed (SIGKILL)"):
        [model] = actors_titled("ray::ServeReplica:matrix:Model")
        model.kill()
        await eventually_async(lambda: model.pid not in _pids("ray::ServeReplica:matrix:Model"))
        await eventually_async(lambda: _pids("ray::ServeReplica:matrix:Model"), 60)


async def test_an_ingress_is_killed(matrix):
    # Its connections break; HAProxy says 500 for those that had no answer yet.
    seen = {TRUNCATED, REFUSED, "500"}
    async with under_load(matrix, "ingress killed (SIGKILL)", seen=seen):
        victim = ingress_processes()[0]
        victim.kill()
        await eventually_async(lambda: len(ingress_processes()) == 1, 30)
        await eventually_async(lambda: len(ingress_processes()) == 2, 60)


async def test_the_controller_is_killed(matrix):
    async with under_load(matrix, "Serve's controller killed (SIGKILL)"):
        [controller] = actors_titled("ray::ServeController")
        controller.kill()
        await eventually_async(lambda: _pids("ray::ServeController") - {controller.pid}, 60)
        await asyncio.sleep(3)


def _pids(title):
    return {process.pid for process in actors_titled(title)}


async def test_the_network_between_ingresses_and_an_engine_is_cut(matrix):
    # The engine is well: its replica finds that out, and it is not replaced.
    before = ids(matrix)
    async with under_load(matrix, "network to an engine cut for ten seconds", seen={CUT}):
        network = next(iter(networks().values()))
        network.send_signal(signal.SIGUSR1)
        await asyncio.sleep(10)
        network.send_signal(signal.SIGUSR2)
    assert ids(matrix) == before
