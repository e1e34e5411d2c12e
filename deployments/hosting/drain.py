"""Who is connected to an engine, as the kernel tells it. Linux only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED: Final = "01"


def count_connections(port: int) -> int:
    """Return how many connections the server on this port of this machine has open.

    Connections that only one side has closed do not count. The engines' own figures would tell
    requests and not connections, but each engine has others, under other names, and none of them
    counts a request that has been sent and not been read yet. One that is kept open between two
    requests counts, too; ingresses close theirs after three seconds.
    """
    return sum(_count(_lines(table), port) for table in _TABLES)


def _count(lines: Iterable[str], port: int) -> int:
    wanted = f"{port:04X}"
    found = 0
    for line in lines:
        _, local, _, state, *_ = line.split(maxsplit=4)
        found += state == _ESTABLISHED and local.rpartition(":")[2] == wanted
    return found


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text().splitlines()[1:]
    except FileNotFoundError:  # a kernel without IPv6
        return []
