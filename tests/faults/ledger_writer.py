"""An ingress's ledger under load, in a process to be killed: python -m … FOLDER URL NAME

It prints what it may rely on, a line each: `open ID` and `settled ID COST` once the ledger has
said so, and `at ID TOKENS` for what a stream has generated. `full` for each refused request.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from app.config.journal import JournalSettings
from app.core.pricing import TokenUsage
from app.ledger.ledger import JournalFull, Ledger, open_ledger
from app.ledger.record import State, now_utc
from app.store.database import connect
from app.store.database_url import resolve_url
from tests.support.records import completed, new_id, opened

STEP = 50


def say(*words: object) -> None:
    # One write a line, so that a kill leaves no half of one before a whole one.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def stream(ledger: Ledger) -> None:
    record = opened(new_id(), arrived=now_utc())
    request_id = record.origin.request_id
    with ledger.reserved():
        await ledger.open(record)
        say("open", request_id)
        tokens = 0
        for _ in range(random.randrange(1, 60)):
            await asyncio.sleep(0.02)
            tokens += 10
            ledger.progress(request_id, TokenUsage(20, 0, tokens))
            say("at", request_id, tokens)
        usage = TokenUsage(20, 0, tokens)
        settled = record.settle(State.COMPLETED, usage, ended=now_utc())
        await ledger.settle(settled)
        say("settled", request_id, settled.cost)


async def unary(ledger: Ledger) -> None:
    record = completed(new_id(), TokenUsage(random.randrange(5000), 0, random.randrange(500)))
    with ledger.reserved():
        await ledger.settle(record)
        say("settled", record.origin.request_id, record.cost)


async def client(ledger: Ledger, request) -> None:
    while True:
        try:
            await request(ledger)
        except JournalFull:
            say("full")
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.002)


async def main() -> None:
    folder, url = sys.argv[1:3]
    settings = JournalSettings(
        folder=folder,
        max_mb=int(sys.argv[3]),
        segment_mb=1,
        progress_tokens=STEP,
        flush_interval_s=0.05,
        adopt_interval_s=0.2,
    )
    ledger = open_ledger(connect(resolve_url(url)), settings)
    await asyncio.gather(
        *(client(ledger, stream) for _ in range(10)), *(client(ledger, unary) for _ in range(4))
    )


if __name__ == "__main__":
    asyncio.run(main())
