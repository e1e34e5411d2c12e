"""Progress of commands that go over many records: on stderr, so that output can be piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO, TypeVar

AFTER_S: Final = 2.0
"""Nothing is shown of what is done sooner."""
EVERY_S: Final = 5.0
"""How often a line is written where there is no terminal."""
_LOOK_ITEMS: Final = 64

_T = TypeVar("_T")


@contextmanager
def counting(
    what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Show how many records were done; yield the function that counts further ones.

    A terminal shows one line that changes. Elsewhere there is a line every few seconds.
    """
    count = _Count(what, stream or sys.stderr, clock)
    try:
        yield count.add
    finally:
        count.end()


def counted(
    items: Iterable[_T],
    what: str,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[_T]:
    """Yield the items, and show how many there were so far."""
    with counting(what, stream, clock) as add:
        unshown = 0
        for item in items:
            yield item
            unshown += 1
            if unshown == _LOOK_ITEMS:
                add(unshown)
                unshown = 0
        add(unshown)


class _Count:
    def __init__(self, what: str, stream: TextIO, clock: Callable[[], float]) -> None:
        self._what = what
        self._stream = stream
        self._clock = clock
        self._live = stream.isatty()
        self._began = clock()
        self._due = self._began + AFTER_S
        self._count = 0
        self._shown = False

    def add(self, count: int) -> None:
        self._count += count
        now = self._clock()
        if now >= self._due:
            self._due = now + (0.2 if self._live else EVERY_S)
            self._show(now)

    def end(self) -> None:
        if self._shown:
            self._show(self._clock())
            if self._live:
                self._stream.write("\n")

    def _show(self, now: float) -> None:
        elapsed = now - self._began
        rate = self._count / elapsed if elapsed else 0.0
        text = f"{self._what}: {self._count:,} records, {rate:,.0f}/s, {elapsed:.0f} s"
        self._stream.write(f"\r{text}\x1b[K" if self._live else f"{text}\n")
        self._stream.flush()
        self._shown = True
