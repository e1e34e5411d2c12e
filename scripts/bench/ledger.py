"""What a usage record costs: python scripts/bench/ledger.py [--ledger URL] [--folder FOLDER]

Requests of one process settle their records as an ingress does, first so many a second, then so
many at once without a pause, with the flusher moving them to the database meanwhile. For each it
prints the time that `settle` takes, and the CPU time of the whole process for a record: making it,
the journal's thread and the flusher's included.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[2]))

from app.config.journal import JournalSettings
from app.core.pricing import RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.ledger.ledger import Ledger, open_ledger
from app.ledger.record import Origin, State, UsageRecord, now_utc
from app.store.database import connect
from app.store.database_url import resolve_url
from scripts.bench.progress import steps

AT_ONCE = (1, 16, 64, 256)
PACES = (100, 500, 1000, 2000)
CARD = RateCard.load({"input": 0.02, "cached_input": 0.01, "output": 0.04}, "rate_card")
DECISION = TierDecision(Tier.PRIORITY, Tier.PRIORITY, None, CARD)
USAGE = TokenUsage(1200, 400, 180)
STEPS = 20


def opened(number: int, *, stream: bool) -> UsageRecord:
    origin = Origin(
        f"req_{time.time_ns():x}{number:08x}", "acme", "k1a2b3c4d5e6", "org/some-model-instruct",
        "chat/completions", stream, Tier.PRIORITY, now_utc(),
    )  # fmt: skip
    return UsageRecord.open(
        origin, DECISION, engine="vllm", replica="model#pool#a1b2c3", queue_s=0.001
    )


async def unary(ledger: Ledger, number: int) -> float:
    with ledger.reserved():
        record = opened(number, stream=False)
        record = record.settle(State.COMPLETED, USAGE, ended=now_utc(), ttft_s=0.1)
        begin = time.perf_counter()
        await ledger.settle(record)
        return time.perf_counter() - begin


async def stream(ledger: Ledger, number: int) -> float:
    with ledger.reserved():
        record = opened(number, stream=True)
        begin = time.perf_counter()
        await ledger.open(record)
        waited = time.perf_counter() - begin
        for step in range(1, STEPS + 1):
            tokens = step * USAGE.completion_tokens // STEPS
            ledger.progress(record.origin.request_id, TokenUsage(1200, 400, tokens))
        record = record.settle(State.COMPLETED, USAGE, ended=now_utc(), ttft_s=0.1)
        begin = time.perf_counter()
        await ledger.settle(record)
        return waited + time.perf_counter() - begin


async def measure_paced(ledger: Ledger, a_second: int, seconds: float) -> None:
    """Requests that come at random times, whether or not those before have ended."""
    waits: list[float] = []
    running: set[asyncio.Task[None]] = set()

    async def client(number: int) -> None:
        waits.append(await unary(ledger, number))

    begin, cpu = time.perf_counter(), time.process_time()
    due, number = 0.0, 0
    while due < seconds:
        due += random.expovariate(a_second)
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        running.add(task := asyncio.create_task(client(number)))
        task.add_done_callback(running.discard)
        number += 1
    await asyncio.gather(*running)
    await asyncio.sleep(1.2)
    cpu, count = time.process_time() - cpu, len(waits)
    waits.sort()
    print(
        f"unary  {a_second:4} a second: waited p50 {waits[count // 2] * 1e3:6.2f} ms, "
        f"p99 {waits[count * 99 // 100] * 1e3:6.2f} ms, {cpu / count * 1e6:4.0f} us CPU a record",
        flush=True,
    )


async def measure(
    ledger: Ledger, request: Callable[[Ledger, int], Awaitable[float]], at_once: int, count: int
) -> None:
    numbers = iter(range(count))
    waits: list[float] = []

    async def client() -> None:
        for number in numbers:
            waits.append(await request(ledger, number))

    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(at_once)))
    elapsed = time.perf_counter() - begin
    await asyncio.sleep(1.2)  # the flusher has caught up
    cpu = time.process_time() - cpu
    waits.sort()
    print(
        f"{request.__name__:6} {at_once:4} at once: {count / elapsed:7,.0f} records/s, "
        f"waited p50 {waits[count // 2] * 1e3:6.2f} ms, p99 {waits[count * 99 // 100] * 1e3:6.2f} "
        f"ms, {cpu / count * 1e6:4.0f} us CPU a record",
        flush=True,
    )


async def run(url: str, settings: JournalSettings, count: int) -> None:
    ledger = open_ledger(connect(resolve_url(url)), settings)
    try:
        await measure_all(ledger, count)
    finally:
        await ledger.close()


async def measure_all(ledger: Ledger, count: int) -> None:
    await asyncio.gather(*(unary(ledger, number) for number in range(500)))
    paced = [partial(measure_paced, ledger, a_second, count / 4000) for a_second in PACES]
    unpaced = [
        partial(measure, ledger, request, at_once, count if at_once > 1 else count // 10)
        for request in (unary, stream)
        for at_once in AT_ONCE
    ]
    for measured in steps([*paced, *unpaced], "ledger"):
        await measured()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", help="a database URL; SQLite in a temporary folder if not set")
    parser.add_argument("--folder", help="of the journal; a temporary one if not set")
    parser.add_argument("--count", type=int, default=20_000, help="records of one line")
    parser.add_argument("--window-ms", type=float, default=0.0, help="commit_window_ms")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = JournalSettings(
            folder=arguments.folder or f"{folder}/journal", commit_window_ms=arguments.window_ms
        )
        url = arguments.ledger or f"sqlite:///{folder}/usage.db"
        uvloop.run(run(url, settings, arguments.count))


if __name__ == "__main__":
    main()
