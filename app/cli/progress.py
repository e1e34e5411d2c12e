"""Progress of commands that take long on large stores: on stderr, so that output can be piped."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO, TypeVar

from app.supervision import keep_thread

AFTER_S: Final = 2.0
"""Nothing is shown of what is done sooner."""
EVERY_S: Final = 5.0
"""How often a line is written where there is no terminal."""
LIVE_S: Final = 0.2
"""How often the line on a terminal changes."""
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


@contextmanager
def working(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Show for how long something goes on that the database does as a whole.

    The database does not report how far it is. A terminal shows one line that changes. Elsewhere
    there is a line every few seconds.
    """
    shown = _Time(what, stream or sys.stderr)
    thread = keep_thread("progress", shown.run, stop=shown.done)
    try:
        yield
    finally:
        shown.done.set()
        thread.join()


class _Time:
    def __init__(self, what: str, stream: TextIO) -> None:
        self.done = threading.Event()
        self._what = what
        self._stream = stream
        self._live = stream.isatty()

    def run(self) -> None:
        began, shown = time.monotonic(), False
        pause_s = AFTER_S
        while not self.done.wait(pause_s):
            text = f"{self._what}: {time.monotonic() - began:.0f} s"
            self._stream.write(f"\r{text}\x1b[K" if self._live else f"{text}\n")
            self._stream.flush()
            shown = True
            pause_s = LIVE_S if self._live else EVERY_S
        if self._live and shown:
            self._stream.write("\n")


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
            self._due = now + (LIVE_S if self._live else EVERY_S)
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
