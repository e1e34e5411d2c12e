"""Arrival rates, and what they will be when an engine that is started now is ready. Pure.

Counts come in, each with its time; they only grow. A rate is measured over a window. Three such
windows beside each other tell a trend, which is followed as far ahead as an engine takes to start,
if both steps rise by more than chance, which is the root of the number of arrivals: a trend lasts,
a burst does not.
"""

from __future__ import annotations

import math
from bisect import bisect_right

# A sudden rise must be more than chance by so many standard deviations: once in 40 it is chance.
_SIGMAS = 2.0
# Windows in which a sudden rise is looked for. One that is no chance shows in five seconds.
_SUDDEN_S = (5.0, 15.0, 30.0)
# Whatever the trend says, a rate is not believed to more than triple until an engine has started.
_MOST_GROWTH = 3.0
# So many arrivals in a window leave an eighth of them to chance.
_ENOUGH = 64
# By so much a window is widened at a time.
_WIDER = 1.2
# Two counts are of different rates if that makes them likelier by this, in standard deviations.
# Some sixty pairs of them are tried at each decision, so two would often be chance.
_CHANGED_SIGMAS = 3.5
# A window is compared with what was before it, over so many times as long: little tells more beside
# much, and a short time before it is of one rate where a long one is of several.
_BEFORE = (0.5, 1.0, 2.0, 4.0)
_EVERY_S = 1.0
_TRIM = 256


class CountedDemand:
    """How a count has grown, over a bounded time."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._times: list[float] = []
        self._counts: list[float] = []
        self._last = self._before = 0.0

    def add(self, now: float, count: float) -> None:
        """Take note of a count. One that is lower than the last has begun anew."""
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
        """Return by how much it grew between two times, as far back as is known."""
        return max(0.0, self._at(end) - self._at(start))

    @property
    def began(self) -> float:
        """The time of the earliest count known; infinity before there is one."""
        return self._times[0] if self._times else math.inf

    def _at(self, when: float) -> float:
        times, counts = self._times, self._counts
        place = bisect_right(times, when)
        if place == 0:
            return counts[0] if counts else 0.0
        if place == len(times):
            return counts[-1]
        share = (when - times[place - 1]) / (times[place] - times[place - 1])
        return counts[place - 1] + share * (counts[place] - counts[place - 1])


def window_for(counted: CountedDemand, now: float, *, least_s: float, most_s: float) -> float:
    """Return over how long a rate is to be measured, so that chance does not rule it.

    It is not measured back beyond a time at which it has clearly changed.
    """
    window_s = least_s
    while window_s < most_s and counted.grown(now - window_s, now) < _ENOUGH:
        if _changed(counted, now, window_s):
            break
        window_s *= _WIDER
    return min(window_s, most_s)


def _changed(counted: CountedDemand, now: float, window_s: float) -> bool:
    """Return whether the rate of a window is another than that before it, and not by chance."""
    middle = now - window_s
    newer = counted.grown(middle, now)
    spans_s = (min(share * window_s, middle - counted.began) for share in _BEFORE)
    return any(
        _differ(counted.grown(middle - span_s, middle), span_s, newer, window_s)
        for span_s in spans_s
        if span_s > 0
    )


def _differ(one: float, one_s: float, other: float, other_s: float) -> bool:
    """Return whether two counts, each over its time, are of different rates, and not by chance.

    Twice the logarithm of by how much likelier two rates make them than one does is distributed as
    the square of a normal variable (S. S. Wilks, Annals of Mathematical Statistics 9, 1938). Unlike
    the difference of the rates, it goes for a handful of arrivals as well.
    """
    gain = _log_likelihood(one, one_s) + _log_likelihood(other, other_s)
    gain -= _log_likelihood(one + other, one_s + other_s)
    return 2 * gain > _CHANGED_SIGMAS**2


def _log_likelihood(count: float, seconds: float) -> float:
    """Return that of a count at the rate that suits it best, but for what all rates share."""
    return count * math.log(count / seconds) if count > 0 else 0.0


def forecast(counted: CountedDemand, now: float, *, window_s: float, ahead_s: float) -> float:
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
    """Return the highest rate that has certainly been reached just now, within a window or less.

    That is what remains of a short window's count when chance is taken off.
    """
    rate = 0.0
    for short_s in _SUDDEN_S:
        if short_s <= min(window_s, now - counted.began):
            count = counted.grown(now - short_s, now)
            rate = max(rate, (count - _SIGMAS * math.sqrt(count)) / short_s)
    return rate
