"""Progress of benchmarks: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S: Final = 5.0
"""How often a line is written where there is no terminal, at most."""

_T = TypeVar("_T")


def steps(
    items: Iterable[_T],
    what: str,
    console: Console | None = None,
    *,
    total: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[_T]:
    """Yield the items, and show how many are done, for how long, and how long the rest will take.

    Args:
        items: what is measured, one after the other.
        what: a word for all of it.
        console: where it is shown; by default stderr, so that results can be piped. On a terminal,
            what is logged to the same console goes above the bar.
        total: how many items there are, if they cannot be counted.
        clock: the time, in seconds.
    """
    console = console or Console(stderr=True)
    if total is None:
        items = items if isinstance(items, Collection) else list(items)
        total = len(items)
    shown = _bar if console.is_terminal else _lines
    yield from shown(items, what, console, total, clock)


def _bar(
    items: Iterable[_T], what: str, console: Console, total: int, clock: Callable[[], float]
) -> Iterator[_T]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, get_time=clock, transient=True) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task)


def _lines(
    items: Iterable[_T], what: str, console: Console, total: int, clock: Callable[[], float]
) -> Iterator[_T]:
    began = clock()
    due = began + EVERY_S
    for done, item in enumerate(items, start=1):
        yield item
        now = clock()
        if now >= due and done < total:
            due = now + EVERY_S
            took_s = now - began
            left = _words(took_s / done * (total - done))
            line = f"{what}: {done} of {total}, {_words(took_s)}, about {left} left"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
