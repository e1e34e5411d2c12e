"""Computes when tokens are due, and wakes all waiting streams with one timer."""

from __future__ import annotations

import asyncio
import heapq
import math
import sys
import time
from dataclasses import dataclass
from typing import Final

TICKS_PER_SECOND: Final = 1000
"""The resolution of the timer, which is libuv's. Streams due in the same tick wake together."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When each token of a running request is due, in seconds of a monotonic clock. Pure.

    ``done`` tokens were generated before it (re)started; the next is due at ``first_at``.
    """

    first_at: float
    seconds_per_token: float
    done: int = 0

    def due(self, now: float) -> int:
        """Return how many tokens are due by ``now``, including those done before.

        The length of the answer is not known here. Without a pace the number exceeds any answer's.
        """
        if now < self.first_at:
            return self.done
        if not self.seconds_per_token:
            return sys.maxsize
        # Without the 1e-6, a rounding error could delay a token that is due exactly now.
        return self.done + 1 + int((now - self.first_at) / self.seconds_per_token + 1e-6)

    def at(self, token: int) -> float:
        """Return when the ``token``-th token is due, counting from 1."""
        return self.first_at + max(token - self.done - 1, 0) * self.seconds_per_token


class Wheel:
    """Wakes many waiting streams with one timer of the event loop, never before they are due."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[int, list[asyncio.Future[None]]] = {}
        self._ticks: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0

    def wait_until(self, due: float) -> asyncio.Future[None]:
        """Return a future that is done at ``due`` (``time.monotonic``), or a tick later."""
        future: asyncio.Future[None] = self._loop.create_future()
        tick = math.ceil(due * TICKS_PER_SECOND)
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.append(future)
            return future
        self._buckets[tick] = [future]
        heapq.heappush(self._ticks, tick)
        if self._timer is None or tick < self._timer_tick:
            self._arm()
        return future

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_tick = self._ticks[0]
        delay = self._timer_tick / TICKS_PER_SECOND - time.monotonic()
        self._timer = self._loop.call_later(max(delay, 0.0), self._turn)

    def _turn(self) -> None:
        self._timer = None
        now = time.monotonic() * TICKS_PER_SECOND
        while self._ticks and self._ticks[0] <= now:
            for future in self._buckets.pop(heapq.heappop(self._ticks)):
                if not future.done():
                    future.set_result(None)
        if self._ticks:
            self._arm()
