"""A steady load for a long time: what the processes hold must not grow.

    FRONTLINE_FAULTS=long python -m pytest -s tests/faults/test_soak.py     an hour
    FRONTLINE_SOAK_S=600 python -m pytest -s tests/faults/test_soak.py      as long as you like

60 requests a second of every kind: whole answers and streams, some left by their clients, some
refused, some with long bodies. It prints what each process holds, and how that grows in an hour.
FRONTLINE_SOAK_RATE=120 sends another number a second. Of every request that takes long or fails it
prints the id, which Serve's log of the ingress has too, and what the Model's board said then.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import linear_regression, mean

import aiohttp
import psutil
import pytest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from tests.support.cluster import (
    actors_titled,
    command_line,
    engine_processes,
    eventually,
    ingress_app,
    ingress_processes,
    simulated_app,
    test_run_processes,
)

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
SECONDS = float(os.environ.get("FRONTLINE_SOAK_S", "3600" if LONG else "15"))
RATE = float(os.environ.get("FRONTLINE_SOAK_RATE", "60"))
LATE_S = 15
"""A request that takes longer is told of while it still waits."""
MOST_TOLD = 50
STRETCHES = 12
"""Of time; the first third does not count."""
JUDGED_S = 1200
"""Slopes are judged from this length on: what starts up grows for minutes."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(SECONDS + 300)]

CHAT = {"model": "soaked", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
LONG_PROMPT = "word " * 20_000
# Kind, path, body, after how many events its client leaves, and how often of a hundred.
KINDS = [
    ("unary", "chat/completions", CHAT, None, 40),
    ("priority", "chat/completions", CHAT | {"service_tier": "priority"}, None, 10),
    ("stream", "chat/completions", CHAT | {"stream": True, "max_tokens": 24}, None, 20),
    ("left", "chat/completions", CHAT | {"stream": True, "max_tokens": 400}, 3, 8),
    (
        "left response", "responses",
        {"model": "soaked", "input": "hello", "max_output_tokens": 400, "stream": True}, 6, 7,
    ),
    ("long prompt", "completions", {"model": "soaked", "prompt": LONG_PROMPT, "max_tokens": 2},
     None, 5),
    ("unknown", "chat/completions", CHAT | {"model": "nobody"}, None, 5),
    ("bad", "chat/completions", CHAT | {"stream": "yes"}, None, 5),
]  # fmt: skip
REFUSED = {"unknown": 404, "bad": 400}


@pytest.fixture(scope="module")
def soaked(cluster):
    folder = "${FRONTLINE_TEST_LEDGER}/soak"
    cluster.deploy(
        ingress_app(journal={"folder": folder}),
        simulated_app("soaked", slots=64, tokens_per_second=200, context_length=100_000),
    )
    cluster.wait_ready("soaked", timeout_s=240)
    yield cluster
    cluster.remove("soaked")
    cluster.restore_ingress()


class Load:
    """Sends requests at a steady rate, whether or not answers come."""

    def __init__(self, session, base):
        self.outcomes = Counter()
        # When each request that is under way was sent, by its id; ids begin with their kind.
        self.sent = {}
        self.failures = []
        self._session, self._base = session, base

    def late(self):
        """Return the requests under way that take long, with their age in seconds."""
        now = time.monotonic()
        return {id_: now - sent for id_, sent in self.sent.items() if now - sent > LATE_S}

    async def run(self, seconds):
        began, tasks = time.monotonic(), set()
        kinds, weights = KINDS, [kind[-1] for kind in KINDS]
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
            kind = random.choices(kinds, weights)[0]
            task = asyncio.create_task(self._one(f"{kind[0]}-{number}".replace(" ", "-"), *kind))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _one(self, id_, kind, path, body, leave_after, _):
        self.sent[id_] = time.monotonic()
        try:
            outcome = await self._ask(id_, f"{self._base}/{path}", body, leave_after)
        except (aiohttp.ClientError, asyncio.IncompleteReadError, TimeoutError) as error:
            outcome = type(error).__name__
        took_s = time.monotonic() - self.sent.pop(id_)
        self.outcomes[kind, outcome] += 1
        if outcome != REFUSED.get(kind, 200):
            self.failures.append(f"{clock()} {id_}: {outcome} after {took_s:.1f} s")

    async def _ask(self, id_, url, body, leave_after):
        headers = {"x-request-id": id_}
        async with self._session.post(url, json=body, headers=headers) as answer:
            if leave_after is None:
                await answer.read()
            else:
                # What is not read to its end closes the connection.
                for _ in range(leave_after):
                    await answer.content.readuntil(b"\n\n")
            return answer.status


def clock():
    """The time of day, as Serve's logs have it."""
    return time.strftime("%H:%M:%S")


def roles():
    """The processes to watch, by what they are."""
    # By its command line: a process that has ended meanwhile has none.
    haproxy = [p for p in test_run_processes() if "/haproxy" in "".join(command_line(p)[:1])]
    models = actors_titled("ray::ServeReplica:soaked:Model")
    return {
        "ingress": ingress_processes(), "haproxy": haproxy, "model": models,
        "engine": engine_processes(),
    }  # fmt: skip


def sample(folder, load):
    """What each role holds now; no process of it may have died."""
    found = {("load", "requests under way"): float(len(load.sent))}
    for role, processes in roles().items():
        held = defaultdict(float)
        for process in processes:
            try:
                held["MB"] += process.memory_info().rss / 1e6
                held["descriptors"] += process.num_fds()
                held["threads"] += process.num_threads()
            except psutil.NoSuchProcess:
                continue
        found |= {(role, what): value for what, value in held.items()}
    found["journal", "files"] = float(len(list(folder.glob("*/*.journal"))))
    return found


async def test_nothing_grows_under_a_steady_load(soaked):
    folder = Path(os.environ["FRONTLINE_TEST_LEDGER"]) / "soak"
    already = len(await asyncio.to_thread(soaked.records))
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=0)
    points, told = [], set()
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        load = Load(session, soaked.base_url)
        running, began = asyncio.create_task(load.run(SECONDS)), time.monotonic()
        while not running.done():
            await asyncio.wait([running], timeout=max(1.0, SECONDS / 240))
            if not running.done():
                now = time.monotonic() - began
                points.append((now, await asyncio.to_thread(sample, folder, load)))
                told |= await asyncio.to_thread(tell_late, soaked, load.late(), told)
        await running
    sent = sum(load.outcomes.values())
    slopes = tell(points, sent, load.outcomes)
    print(*load.failures[:MOST_TOLD], sep="\n")
    wrong = {
        (kind, outcome): count
        for (kind, outcome), count in load.outcomes.items()
        if outcome != REFUSED.get(kind, 200)
    }
    assert not wrong
    placed = sum(count for (kind, _), count in load.outcomes.items() if kind not in REFUSED)
    # Requests that were refused at once have no record.
    eventually(lambda: len(soaked.records()) - already >= placed, 30)
    if SECONDS >= JUDGED_S:
        for (role, what), (level, slope) in slopes.items():
            most = level * 0.05 + 4 if what == "MB" else max(2, level * 0.1)
            assert slope < most or role == "load", (role, what, slope)


def tell_late(soaked, late, told):
    """Print requests that take long and what the Model says now, once each; return their ids."""
    new = late.keys() - told
    if new and len(told) < MOST_TOLD:
        ages = ", ".join(f"{id_} ({late[id_]:.0f} s)" for id_ in sorted(new))
        print(f"\n{clock()} still under way: {ages}")
        try:
            print(*soaked.board("soaked").ingresses, sep="\n")
        except (RayError, RayServeException, TimeoutError) as error:
            print(f"no board: {error!r}")
    return new


def tell(points, sent, outcomes):
    """Print what each role holds and how it grows in an hour, and return it.

    The least of each stretch of time counts: what leaks stays, and what else is held goes up and
    down with the requests that are under way.
    """
    print(f"\n{sent} requests in {points[-1][0]:.0f} s: {dict(outcomes)}")
    length = -(-len(points) // STRETCHES)
    stretches = [points[at : at + length] for at in range(0, len(points), length)]
    times = [mean(time for time, _ in stretch) for stretch in stretches]
    slopes = {}
    for name in points[0][1]:
        values = [[held.get(name, 0.0) for _, held in stretch] for stretch in stretches]
        least = list(map(min, values))
        warm = len(stretches) // 3
        if name[1] == "MB":
            slope = linear_regression(times[warm:], least[warm:]).slope * 3600
        else:
            # What is counted grows in steps, on which a line is steeper than what it grew by.
            slope = (least[-1] - least[warm]) / (times[-1] - times[warm]) * 3600
        slopes[name] = mean(least[warm:]), slope
        print(f"{' '.join(name):24} {' '.join(f'{value:6.1f}' for value in least)}  "
              f"{slope:+8.2f} an hour, {max(map(max, values)):.0f} at most")  # fmt: skip
    print(json.dumps({" ".join(name): values for name, values in slopes.items()}))
    return slopes
