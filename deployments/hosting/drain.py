"""Counts the open connections to an engine, from the kernel's tables. Linux only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED: Final = "01"


def count_connections(port: int) -> int:
    """Return how many connections the server on this port of this machine has open.

    Half-closed connections do not count. A connection kept open between two requests counts;
    ingresses close theirs after three seconds. The engines' own metrics would count requests, but
    their names differ by engine, and none counts a request that was sent and not read yet.
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
