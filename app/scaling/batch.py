"""Measures how much longer a request takes while all slots are taken. Pure.

Engines batch continuously: each step computes a token for every running request, and takes longer,
the more of them there are. A request that takes 4 s on an idle replica may take 12 s on a full one.
So a half-empty fleet does not carry twice its load, and a plan needs the time that a request takes
once the replicas are full.

A step is linear in its batch, so the service time is taken as linear in the share of slots that are
taken. Its slope is fitted by least squares to what was measured, with a prior that counts as little
as a few minutes of a changing load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from app.scaling.forecast import CountedDemand

# A sample lasts so long, and twice as long as a request takes, so that most requests that ended in
# it ran in it.
_SAMPLE_S = 30.0
_SAMPLE_SERVICES = 2.0
# While a fleet fills up, the first requests to end are the short ones. So a sample counts only if
# the number of running requests changed by less than this share of those that ended.
_STEADY = 0.25
# With so many requests, a sample counts half.
_HALF = 20.0
# Samples fade: after an hour they count a third.
_FADE_S = 3600.0
# Unless measured, a request takes three times as long on a full replica as on an idle one.
_PRIOR_GROWTH = 2.0
# The utilisation that service times are taken for. Fleets that are planned well are about as full.
_FULL = 0.9
# The prior counts as much as samples whose squared deviations of utilisation sum to this.
_PRIOR_WEIGHT = 0.02


class FullBatch:
    """The utilisation and the service times of one model, sampled, and the line through them."""

    def __init__(self, window_s: float) -> None:
        """Take the longest time over which ``slower`` is asked for, in seconds."""
        # Slot-seconds that were taken, and that there were.
        self._taken, self._offered = CountedDemand(window_s), CountedDemand(window_s)
        self._taken_s = self._offered_s = 0.0
        self._last = math.nan
        self._sample: _Begin | None = None
        # Sums of weights w, and of w u, w s, w u² and w u s: u the utilisation, s the service time.
        self._sums = [0.0, 0.0, 0.0, 0.0, 0.0]

    def note(
        self, now: float, *, running: float, slots: float, finished: float, served_s: float
    ) -> None:
        """Record how many requests run in how many slots, and the counts of those that ended.

        Args:
            now: the time, in seconds.
            running: how many requests run.
            slots: how many slots are ready.
            finished: how many requests have ended, as a growing count.
            served_s: the sum of the times that these held a slot, in seconds.
        """
        passed = 0.0 if math.isnan(self._last) else max(0.0, now - self._last)
        self._last = now
        self._taken_s += passed * min(running, slots)
        self._offered_s += passed * slots
        self._taken.add(now, self._taken_s)
        self._offered.add(now, self._offered_s)
        begin = _Begin(now, finished, served_s, running, self._taken_s, self._offered_s)
        if (
            self._sample is None
            or finished < self._sample.finished
            or self._ends(self._sample, begin)
        ):
            self._sample = begin

    def slower(self, now: float, window_s: float) -> float:
        """Return how much longer requests take in a full fleet than in the last ``window_s``."""
        offered_s = self._offered.grown(now - window_s, now)
        if not offered_s:
            return 1.0
        used = self._taken.grown(now - window_s, now) / offered_s
        total, weighed, *_ = self._sums
        mean = weighed / total if total else used
        slope = self._slope(mean)
        here = 1.0 + slope * (used - mean)
        return max(1.0, (1.0 + slope * (_FULL - mean)) / here) if here > 0 else 1.0

    def _ends(self, begin: _Begin, end: _Begin) -> bool:
        """Return whether a sample is over, and add it if the fleet was steady."""
        lasted_s, ended = end.now - begin.now, end.finished - begin.finished
        if lasted_s < _SAMPLE_S or not ended:
            return False
        service_s = (end.served_s - begin.served_s) / ended
        if lasted_s < _SAMPLE_SERVICES * service_s:
            return False
        offered_s = end.offered_s - begin.offered_s
        steady = abs(end.running - begin.running) <= _STEADY * ended
        if steady and offered_s > 0 and service_s > 0:
            used = (end.taken_s - begin.taken_s) / offered_s
            terms = (1.0, used, service_s, used**2, used * service_s)
            weight, fade = ended / (ended + _HALF), math.exp(-lasted_s / _FADE_S)
            self._sums = [
                fade * total + weight * term for total, term in zip(self._sums, terms, strict=True)
            ]
        return True

    def _slope(self, mean: float) -> float:
        """Return the slope of the line, relative to the service time at the mean utilisation."""
        total, _, times_s, squares, products = self._sums
        prior = _PRIOR_GROWTH / (1.0 + _PRIOR_GROWTH * mean)
        if not times_s:
            return prior
        spread = max(0.0, squares - total * mean**2)
        together = products * total / times_s - total * mean
        slope = (together + _PRIOR_WEIGHT * prior) / (spread + _PRIOR_WEIGHT)
        # An idle replica takes some time, and a full one no less than it.
        return min(max(slope, 0.0), 1.0 / mean if mean else math.inf)


@dataclass(frozen=True, slots=True)
class _Begin:
    """The counts at the begin of a sample; the last two are slot-seconds."""

    now: float
    finished: float
    served_s: float
    running: float
    taken_s: float
    offered_s: float
