"""The history of one model, bounded: seconds for some minutes, coarser for an hour. Pure."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Final

import orjson

from app.core.tiers import Tier
from app.history.point import Point, TierPoint

SECONDS: Final = 300
"""Points a second apart: five minutes."""
COARSE_S: Final = 20.0
"""Distance of coarse points, in seconds: less than the window of their rates and quantiles, so that
they leave nothing out."""
COARSE: Final = 180
"""Coarse points: an hour. A row takes 0.3 KB with two replicas and 2 KB with ``MOST_REPLICAS``, so
the whole history of a model takes 150 KB to 1 MB."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A part of a history.

    Attributes:
        number: how many points there have been; the point with this number is the last one here.
        fine: rows a second apart, as JSON, the oldest first (``Point.to_row``).
        coarse: the same, ``COARSE_S`` apart.
    """

    number: int
    fine: tuple[bytes, ...]
    coarse: tuple[bytes, ...]


class History:
    """The points of one model. Rows are kept as JSON, which is also how they are sent."""

    def __init__(self) -> None:
        self._number = 0
        self._fine: deque[bytes] = deque(maxlen=SECONDS)
        self._coarse: deque[bytes] = deque(maxlen=COARSE)
        # For each coarse row, how many points there were when it was complete.
        self._ends: deque[int] = deque(maxlen=COARSE)
        self._period: list[Point] = []

    def add(self, point: Point) -> None:
        """Add the present point; times never go back by more than a step of the clock."""
        self._number += 1
        self._fine.append(orjson.dumps(point.to_row()))
        # After a step of the clock the period begins anew, however far it went.
        if self._period and not 0 <= point.at - self._period[0].at < COARSE_S:
            self._coarse.append(orjson.dumps(merged(self._period).to_row()))
            self._ends.append(self._number)
            self._period = []
        self._period.append(point)

    def since(self, number: int) -> Rows:
        """Return the points after the one with this number, as far as they are kept; 0: all."""
        missing = max(0, self._number - number)
        fine = list(self._fine)
        recent = tuple(fine[max(0, len(fine) - missing) :])
        coarse = tuple(
            row for row, end in zip(self._coarse, self._ends, strict=True) if end > number
        )
        return Rows(self._number, recent, coarse)


def merged(points: list[Point]) -> Point:
    """Return one point for a period: the highest queue of it, its sums, and its end.

    Rates and quantiles of the last point cover the whole period.
    """
    last, sheds, downgrades = points[-1], Counter[str](), Counter[str]()
    for point in points:
        sheds.update(point.sheds)
        downgrades.update(point.downgrades)
    tiers = {tier: _merged_tier([point.tiers[tier] for point in points]) for tier in Tier}
    return replace(last, tiers=tiers, sheds=sheds, downgrades=downgrades)


def _merged_tier(points: list[TierPoint]) -> TierPoint:
    return replace(
        points[-1],
        waiting=max(point.waiting for point in points),
        oldest_s=max(point.oldest_s for point in points),
        suspended=max(point.suspended for point in points),
    )
