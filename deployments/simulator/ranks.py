"""Parts of one engine on several nodes, started like vLLM's and SGLang's.

The first has the HTTP server, and waits for the others before it is ready. The others end when the
first does. The first does not notice when another has gone, as engines often do not that wait in a
collective operation: it goes on taking requests, and answers none any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class Ranks:
    """How many parts there are, which one this is, and where they meet."""

    nodes: int
    rank: int
    host: str
    port: int

    @classmethod
    def parse(cls, nodes: int, rank: int, meet: str) -> Ranks:
        """Return the value for command line options; ``meet`` is ``HOST:PORT``."""
        host, _, port = meet.rpartition(":")
        return cls(nodes, rank, host.strip("[]"), int(port or 0))


async def gather(ranks: Ranks) -> asyncio.Event:
    """Return when all others are connected. The event is set when one of them disconnects."""
    all_here, one_gone = asyncio.Event(), asyncio.Event()
    here: set[bytes] = set()

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.add(await reader.readline())
        if len(here) == ranks.nodes - 1:
            all_here.set()
            writer.write(b"all here\n")
        await reader.read()
        one_gone.set()
        writer.close()

    await asyncio.start_server(welcome, ranks.host, ranks.port)
    await all_here.wait()
    return one_gone


async def join(ranks: Ranks) -> None:
    """Meet the first part, and return when it has ended."""
    while True:
        try:
            reader, writer = await asyncio.open_connection(ranks.host, ranks.port)
            break
        except ConnectionRefusedError:
            await asyncio.sleep(_LOOK_AGAIN_S)
    writer.write(b"%d\n" % ranks.rank)
    while await reader.read(1024):
        pass
    writer.close()
