"""Arrival rates, and what they will be when an engine that is started now is ready. Pure.

Counts come in, each with its time; they only grow. A rate is measured over a window. Two such
windows beside each other tell a trend, which is followed as far ahead as an engine takes to start,
if it is more than chance: arrivals by chance have a standard deviation of the root of their number.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque

_EVERY_S = 1.0
# A rise must be more than chance by so many standard deviations: once in 40 it is chance then.
_SIGMAS = 2.0
# Windows in which a sudden rise is looked for. One that is no chance shows in five seconds.
_SUDDEN_S = (5.0, 15.0, 30.0)
# Whatever the trend says, a rate is not believed to more than triple until an engine has started.
_MOST_GROWTH = 3.0


class Counted:
    """How a count has grown, over a bounded time."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._points: deque[tuple[float, float]] = deque()
        self._last = self._before = 0.0

    def keep(self, keep_s: float) -> None:
        """Remember for so long from now on."""
        self._keep_s = keep_s

    def add(self, now: float, count: float) -> None:
        """Take note of a count. One that is lower than the last has begun anew."""
        if count < self._last:
            self._before += self._last
        self._last = count
        count += self._before
        points = self._points
        if len(points) > 1 and now - points[-2][0] < _EVERY_S:
            points.pop()
        points.append((now, count))
        while len(points) > 2 and points[1][0] <= now - self._keep_s:
            points.popleft()

    def grown(self, start: float, end: float) -> float:
        """Return by how much it grew between two times, as far back as is known."""
        return max(0.0, self._at(end) - self._at(start))

    @property
    def began(self) -> float:
        """The time of the earliest count known; infinity before there is one."""
        return self._points[0][0] if self._points else math.inf

    def _at(self, when: float) -> float:
        points = self._points
        place = bisect_right(points, when, key=lambda point: point[0])
        if place == 0:
            return points[0][1] if points else 0.0
        before = points[place - 1]
        if place == len(points):
            return before[1]
        after = points[place]
        share = (when - before[0]) / (after[0] - before[0])
        return before[1] + share * (after[1] - before[1])


def forecast(counted: Counted, now: float, *, window_s: float, ahead_s: float) -> float:
    """Return the rate a second at which a count will grow, some seconds from now.

    Args:
        counted: what was counted so far.
        now: seconds.
        window_s: over how long a rate is measured. Where less is known, over that.
        ahead_s: how far from now. A falling trend is not followed: what it would save, a late
            scale-down saves a little later.
    """
    known_s = now - counted.began
    if not 0 < known_s < math.inf:
        return 0.0
    window_s = min(window_s, max(known_s, _EVERY_S))
    lately = counted.grown(now - window_s, now)
    rate = lately / window_s
    if known_s >= 2 * window_s:
        before = counted.grown(now - 2 * window_s, now - window_s)
        if lately - before > _SIGMAS * math.sqrt(lately + before):
            rise = (lately - before) / window_s**2 * (window_s / 2 + ahead_s)
            rate = min(rate + rise, _MOST_GROWTH * rate)
    return rate


def sudden(counted: Counted, now: float, *, window_s: float) -> float:
    """Return the highest rate that has certainly been reached just now, within a window or less.

    That is what remains of a short window's count when chance is taken off.
    """
    rate = 0.0
    for short_s in _SUDDEN_S:
        if short_s <= min(window_s, now - counted.began):
            count = counted.grown(now - short_s, now)
            rate = max(rate, (count - _SIGMAS * math.sqrt(count)) / short_s)
    return rate
