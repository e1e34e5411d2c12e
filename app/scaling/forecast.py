"""Measures arrival rates, and forecasts them for when an engine started now is ready. Pure.

The input is a growing count with the time of each value. A rate is measured over a window. Three
adjacent windows give a trend. It is extrapolated by the time that an engine takes to start, but
only if both steps rise by more than chance, which is the square root of the number of arrivals. A
trend lasts; a burst does not.
"""

from __future__ import annotations

import math
from bisect import bisect_right

# Standard deviations that are subtracted from a count: a sudden rise is chance once in 40.
_SIGMAS = 2.0
# Windows in which a sudden rise is detected. One that is not chance shows in five seconds.
_SUDDEN_S = (5.0, 15.0, 30.0)
# Whatever the trend, a rate is forecast to triple at most until an engine has started.
_MOST_GROWTH = 3.0
# With this many arrivals in a window, chance is an eighth of them.
_ENOUGH = 64
# Factor by which a window is widened per step.
_WIDER = 1.2
# Two counts have different rates if that is likelier by this many standard deviations. Some sixty
# pairs are tried at each decision, so two standard deviations would often be chance.
_CHANGED_SIGMAS = 3.5
# A window is compared with spans before it of these multiples of its length. A long span is more
# precise; a short one is less likely to mix several rates.
_BEFORE = (0.5, 1.0, 2.0, 4.0)
_EVERY_S = 1.0
_TRIM = 256


class CountedDemand:
    """The history of a growing count, over a bounded time."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._times: list[float] = []
        self._counts: list[float] = []
        self._last = self._before = 0.0

    def add(self, now: float, count: float) -> None:
        """Add a count. A count below the last one has restarted from 0."""
        if count < self._last:
            self._before += self._last
        self._last = count
        times, counts = self._times, self._counts
        if len(times) > 1 and now - times[-2] < _EVERY_S:
            del times[-1], counts[-1]
        times.append(now)
        counts.append(count + self._before)
        if len(times) > _TRIM and times[_TRIM] <= now - self._keep_s:
            del times[: _TRIM - 1], counts[: _TRIM - 1]

    def grown(self, start: float, end: float) -> float:
        """Return by how much the count grew between two times, as far back as is known."""
        return max(0.0, self._at(end) - self._at(start))

    @property
    def began(self) -> float:
        """The time of the earliest known count; infinity if there is none."""
        return self._times[0] if self._times else math.inf

    def _at(self, when: float) -> float:
        times, counts = self._times, self._counts
        index = bisect_right(times, when)
        if index == 0:
            return counts[0] if counts else 0.0
        if index == len(times):
            return counts[-1]
        share = (when - times[index - 1]) / (times[index] - times[index - 1])
        return counts[index - 1] + share * (counts[index] - counts[index - 1])


def window_for(counted: CountedDemand, now: float, *, least_s: float, most_s: float) -> float:
    """Return the window over which to measure a rate, in seconds, so that chance is small.

    The window does not extend back beyond a time at which the rate has clearly changed.
    """
    window_s = least_s
    while window_s < most_s and counted.grown(now - window_s, now) < _ENOUGH:
        if _changed(counted, now, window_s):
            break
        window_s *= _WIDER
    return min(window_s, most_s)


def _changed(counted: CountedDemand, now: float, window_s: float) -> bool:
    """Return whether the rate of a window differs from that before it by more than chance."""
    middle = now - window_s
    newer = counted.grown(middle, now)
    spans_s = (min(share * window_s, middle - counted.began) for share in _BEFORE)
    return any(
        _differ(counted.grown(middle - span_s, middle), span_s, newer, window_s)
        for span_s in spans_s
        if span_s > 0
    )


def _differ(one: float, one_s: float, other: float, other_s: float) -> bool:
    """Return whether two counts, each over its time, have rates that differ by more than chance.

    This is a likelihood ratio test of two rates against one. Twice the logarithm of the ratio is
    distributed as the square of a normal variable (S. S. Wilks, Annals of Mathematical Statistics
    9, 1938). Unlike the difference of the rates, it is valid for a handful of arrivals as well.
    """
    gain = _log_likelihood(one, one_s) + _log_likelihood(other, other_s)
    gain -= _log_likelihood(one + other, one_s + other_s)
    return 2 * gain > _CHANGED_SIGMAS**2


def _log_likelihood(count: float, seconds: float) -> float:
    """Return the log likelihood of a count at its best rate, without the terms common to all."""
    return count * math.log(count / seconds) if count > 0 else 0.0


def forecast(counted: CountedDemand, now: float, *, window_s: float, ahead_s: float) -> float:
    """Return the rate per second at which a count will grow ``ahead_s`` from now.

    Args:
        counted: the counts so far.
        now: the time, in seconds.
        window_s: the window over which a rate is measured; the known time if that is shorter.
        ahead_s: how far to extrapolate a rising trend, in seconds. A falling trend is not followed:
            a late scale-down saves nearly as much.
    """
    known_s = now - counted.began
    if not 0 < known_s < math.inf:
        return 0.0
    window_s = min(window_s, max(known_s, _EVERY_S))
    last, middle, first = (
        counted.grown(now - (back + 1) * window_s, now - back * window_s) for back in range(3)
    )
    rate = last / window_s
    if known_s < 3 * window_s:
        return rate
    chance = math.sqrt(last + middle)
    rise = min(last - middle, middle - first)
    if rise > chance:
        rate += min(rise / window_s**2 * (window_s / 2 + ahead_s), (_MOST_GROWTH - 1) * rate)
    return rate


def sudden(counted: CountedDemand, now: float, *, window_s: float) -> float:
    """Return the highest rate per second reached for certain just now, within ``window_s``.

    It is the count of a short window less chance, divided by the window.
    """
    rate = 0.0
    for short_s in _SUDDEN_S:
        if short_s <= min(window_s, now - counted.began):
            count = counted.grown(now - short_s, now)
            rate = max(rate, (count - _SIGMAS * math.sqrt(count)) / short_s)
    return rate
