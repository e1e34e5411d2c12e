"""What clients see while HAProxy, or the actor that manages it, is killed and comes back.

One ingress and one engine replica: nothing else could answer meanwhile.
"""

import asyncio
import os
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.cluster import (
    PLAIN,
    actors_titled,
    eventually,
    eventually_async,
    ingress_app,
    simulated_app,
    test_run_processes,
)
from tests.support.waiting import PATIENCE_S

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
KILLS = 5 if LONG else 1
CLIENTS = 4
REFUSED = "connection refused"
BROKEN = "connection broken"
LONGEST_GAP_S = 15.0
"""Far above what it takes, and far below the 25 s without the keeper."""
REQUEST = {
    "model": "door",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 1,
}

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@dataclass
class Seen:
    """Outcomes of requests, each on a connection of its own, with the time of each."""

    outcomes: list[tuple[float, str]] = field(default_factory=list)

    def since(self, began):
        return [one for one in self.outcomes if one[0] >= began]

    def longest_gap(self, began):
        """The longest time without an answer, in seconds."""
        answered = [at for at, outcome in self.since(began) if outcome == "200"]
        times = [began, *answered, time.monotonic()]
        return max(b - a for a, b in pairwise(times))

    def told(self, began):
        counts = Counter(outcome for _, outcome in self.since(began))
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())


async def outcome_of(client):
    try:
        answer = await client.post("/v1/chat/completions", json=REQUEST)
    except httpx.ConnectError:
        return REFUSED
    except httpx.TransportError:
        return BROKEN
    return "200" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:60]!r}"


async def knock(cluster, seen, ended):
    no_reuse = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=cluster.root, verify=PLAIN, timeout=PATIENCE_S, limits=no_reuse
    ) as client:
        while not ended.is_set():
            outcome = await outcome_of(client)
            seen.outcomes.append((time.monotonic(), outcome))
            await asyncio.sleep(0.02)


@asynccontextmanager
async def knocking(cluster):
    seen, ended = Seen(), asyncio.Event()
    clients = [asyncio.create_task(knock(cluster, seen, ended)) for _ in range(CLIENTS)]
    try:
        yield seen
    finally:
        ended.set()
        await asyncio.gather(*clients)


@pytest.fixture(scope="module")
def door(cluster):
    cluster.deploy(ingress_app(), simulated_app("door"))
    cluster.wait_ready("door")
    eventually(haproxies)
    yield cluster
    cluster.remove("door")


def haproxies():
    return [one for one in test_run_processes() if _is_haproxy(one)]


def _is_haproxy(process):
    try:
        return Path(process.exe()).name == "haproxy"
    except psutil.Error:
        return False


def managers():
    return {one.pid: one for one in actors_titled("ray::HAProxyManager")}


def kill_haproxy():
    for process in haproxies():
        process.kill()


def kill_manager():
    [manager] = managers().values()
    manager.kill()


def managers_beside(known):
    return managers().keys() - known


@pytest.mark.parametrize("kill", [kill_haproxy, kill_manager])
async def test_what_stands_before_the_ingresses_is_killed(door, kill):
    async with knocking(door) as seen:
        for _ in range(KILLS):
            await asyncio.sleep(1)
            before = managers().keys()
            began = time.monotonic()
            await asyncio.to_thread(kill)
            # Serve itself replaces both, though clients no longer wait for that.
            await eventually_async(partial(managers_beside, before), 90)
            await asyncio.sleep(6)
            gap_s = seen.longest_gap(began)
            print(f"\n| {kill.__name__} | {seen.told(began)} | {gap_s:.2f} s |")
            assert gap_s < LONGEST_GAP_S
    refused = {outcome for _, outcome in seen.outcomes if outcome.startswith("4")}
    assert not refused, "clients do not retry that"
