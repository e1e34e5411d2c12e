"""Records the history of one model for its Model actor. Pure: the times are passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import orjson

from app.config.slo import SloSettings
from app.contracts.news import ModelNews, ScalingDecision
from app.contracts.slo import TierAttainment, attainments
from app.contracts.speeds import Speeds
from app.contracts.stats import ModelBoard, QueueReport, Suspended
from app.contracts.traffic import Traffic
from app.core.tiers import Tier
from app.history.point import (
    WINDOW_S,
    Point,
    downgrades_of,
    queue_points,
    replica_points,
    sheds_of,
)
from app.history.rings import History
from app.history.state import state_of
from app.history.sums import TrafficSums
from app.history.window import Window

POINT_S: Final = 1.0
"""Distance of two points, in seconds: what ingresses report, and people read, is no faster."""
MOST_DECISIONS: Final = 30
"""How many decisions are remembered. They are a part of the state, which is sent every second: 30
take up to 15 KB. A policy that waits before it scales down makes fewer in an hour."""
SPEEDS_S: Final = 300.0
"""How far back speeds reach: short enough to show what holds now, long enough for a quiet model to
have had some requests."""
_SPEEDS_STEP_S: Final = 5.0
ATTAINMENT_S: Final = 3600.0
"""How far back attainment reaches: as far as the history that the board draws."""
_ATTAINMENT_STEP_S: Final = 20.0


class Recorder:
    """The sums, the history and the scaling decisions of one model.

    Args:
        life: identifies the Model process.
        now: the monotonic time at its start, in seconds.
        wall: the same moment in Unix seconds.
    """

    def __init__(self, life: str, now: float, wall: float) -> None:
        self._life = life
        self._began = wall
        self._sums = TrafficSums(now)
        self._recent = Window(WINDOW_S)
        self._last: Traffic | None = None
        self._speeds = Window(SPEEDS_S, _SPEEDS_STEP_S)
        self._attainment = Window(ATTAINMENT_S, _ATTAINMENT_STEP_S)
        self._attained: tuple[Traffic, float, Traffic] = (Traffic(), 0.0, Traffic())
        self._history = History()
        self._decisions: deque[ScalingDecision] = deque(maxlen=MOST_DECISIONS)
        self._state = b"{}"

    def take(self, ingress: str, report: QueueReport | None, now: float) -> None:
        """Record the traffic in an ingress's report, if there is any."""
        # The report of an ingress of an older version, as during an update, lacks the field.
        traffic = getattr(report, "traffic", None)
        if traffic is not None:
            self._sums.take(ingress, traffic, now)

    def decided(self, decisions: Iterable[ScalingDecision]) -> None:
        """Add the decisions that are not known yet; they come in the order of their times."""
        last = self._decisions[-1].at if self._decisions else -1.0
        self._decisions.extend(one for one in decisions if one.at > last)

    def record(
        self, board: ModelBoard, suspended: Mapping[Tier, Suspended], now: float, wall: float
    ) -> None:
        """Add the present point. To be called every ``POINT_S`` seconds."""
        total = self._sums.total()
        counted = self._sums.grown(total)
        recent, window_s = self._recent.add(now, counted)
        new = counted.since(counted if self._last is None else self._last)
        self._last = counted
        point = Point(
            wall,
            queue_points(board.ingresses, suspended, recent, window_s),
            sheds_of(new),
            downgrades_of(new),
            replica_points(board.snapshot.replicas, board.ingresses),
        )
        self._history.add(point)
        self._attained = (*self._attainment.add(now, Traffic(slo=counted.slo)), total)
        speeds = Speeds.of(*self._speeds.add(now, Traffic(tiers=counted.tiers)))
        state = state_of(
            replace(board, slo=self.slo(board.snapshot.settings.slo)),
            total,
            point,
            self._decisions,
            self._began,
            speeds,
        )
        self._state = orjson.dumps(state)

    def slo(self, settings: SloSettings) -> dict[Tier, TierAttainment]:
        """Return how many streams met the objectives, as of the latest point."""
        recent, recent_s, total = self._attained
        return attainments(settings, recent.slo, recent_s, total.slo)

    def downgrades(self) -> dict[str, int]:
        """Return how many requests were not served as requested, as of the latest point."""
        return dict(downgrades_of(self._attained[2]))

    def news(self, life: str, number: int) -> ModelNews:
        """Return the state, and the history after a point of this life; all of it to others."""
        rows = self._history.since(number if life == self._life else 0)
        return ModelNews(self._life, rows.number, self._state, rows.fine, rows.coarse)
