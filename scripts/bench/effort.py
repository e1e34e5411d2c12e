"""What a measurement takes of the machine that it runs on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psutil

Processes = Callable[[], dict[str, float]]
"""Tells the processor seconds used so far, by what used them."""


class Effort:
    """What the generator itself takes, and the server's processes, from ``begin`` to ``end``.

    Attributes:
        cores: cores in use on average, by what used them: the generator's event loop, the server's
            processes, and everything on this machine, whosoever's.
        lag_s: how late that loop was, at the 99th percentile: no time is measured better.
    """

    def __init__(self, processes: Processes) -> None:
        self.cores: dict[str, float] = {}
        self.lag_s = 0.0
        self._processes = processes
        self._lags: list[float] = []
        self._begun = 0.0
        self._before: dict[str, float] = {}
        self._probe: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start measuring, on the event loop."""
        self._before = self._used()
        self._begun = time.monotonic()
        self._probe = asyncio.create_task(self._watch())

    def end(self) -> None:
        """Stop measuring."""
        assert self._probe is not None, "it was begun"
        self._probe.cancel()
        wall = time.monotonic() - self._begun
        self.cores = {
            name: (used - self._before.get(name, 0.0)) / wall for name, used in self._used().items()
        }
        self.lag_s = sorted(self._lags)[int(len(self._lags) * 0.99)] if self._lags else 0.0

    def _used(self) -> dict[str, float]:
        times = psutil.cpu_times()
        return {
            "load generator": time.thread_time(),
            "whole machine": sum(times) - times.idle - times.iowait - times.guest,
            **self._processes(),
        }

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            self._lags.append(max(0.0, time.monotonic() - due))
