"""What ingresses tell a Model about its queue. Pure: the time is passed in.

People look at it, and rates for autoscaling are made of it; credits go by demands alone
(``app.flow.credits``). A report rides along with a demand, and repeats nothing that stands in it.
Counts only grow while an ingress lives, so whoever compares two reports of it gets true rates,
however many were lost between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.contracts.status import ModelSnapshot
from app.core.tiers import Tier
from app.flow.credits import SILENCE_S, Demand
from app.flow.request import QueuedRequest, RequestState, ShedReason

REPORT_S = 1.0
"""How long at least between two reports of an ingress. Renewals are four a second under load, and
forty where priority waits; people read no faster than once a second."""


@dataclass(frozen=True, slots=True)
class QueueReport:
    """The queue of one model in one ingress. Counts are since the ingress began to follow it.

    Attributes:
        at: when it was made, in seconds by the ingress's own clock.
        headroom: how many free slots the ingress keeps for priority.
        grants_per_s: how many requests were given a slot lately, by tier; see
            ``Line.grant_rate``.
        placed: how many requests were placed, by tier, replays not counted.
        queued_s: how long those had waited, all together, by tier.
        sheds: how many requests were turned away, by tier and reason; pairs without any are
            left out.
        arrived: how many requests have come, by tier.
        finished: how many that were placed have ended, by tier, whatever came of them.
        served_s: for how long those had been placed, all together, by tier.
    """

    at: float
    headroom: int
    grants_per_s: Mapping[Tier, float]
    placed: Mapping[Tier, int]
    queued_s: Mapping[Tier, float]
    sheds: Mapping[tuple[Tier, ShedReason], int]
    arrived: Mapping[Tier, int] = field(default_factory=dict)
    finished: Mapping[Tier, int] = field(default_factory=dict)
    served_s: Mapping[Tier, float] = field(default_factory=dict)


class Tally:
    """Counts what becomes of the requests of one model in one ingress.

    Attributes:
        untold: whether anything was counted since the last report.
    """

    def __init__(self) -> None:
        self.untold = False
        self._placed: Counter[Tier] = Counter()
        self._queued_s = dict.fromkeys(Tier, 0.0)
        self._sheds: Counter[tuple[Tier, ShedReason]] = Counter()
        self._arrived: Counter[Tier] = Counter()
        self._finished: Counter[Tier] = Counter()
        self._served_s = dict.fromkeys(Tier, 0.0)

    def arrive(self, request: QueuedRequest) -> None:
        """Count a request that has just come, at the tier at which it stands in the queue."""
        self.untold = True
        self._arrived[request.tier] += 1

    def end(self, request: QueuedRequest, now: float) -> None:
        """Count a placed request that is over."""
        self.untold = True
        self._finished[request.tier] += 1
        self._served_s[request.tier] += now - request.placed

    def count(self, request: QueuedRequest) -> None:
        """Count a request that is told just now that it has been placed or shed."""
        self.untold = True
        if request.state is RequestState.SHED:
            assert request.shed is not None, "who is shed is told why"
            self._sheds[request.tier, request.shed] += 1
        elif not request.replayed:
            # A replay has been counted once, and was with an engine for part of the time.
            self._placed[request.tier] += 1
            self._queued_s[request.tier] += request.placed - request.arrived

    def report(
        self, at: float, *, headroom: int, grants_per_s: Mapping[Tier, float]
    ) -> QueueReport:
        """Return everything counted so far; see ``QueueReport``."""
        self.untold = False
        return QueueReport(
            at=at,
            headroom=headroom,
            grants_per_s=grants_per_s,
            placed={tier: self._placed[tier] for tier in Tier},
            queued_s=dict(self._queued_s),
            sheds=dict(self._sheds),
            arrived={tier: self._arrived[tier] for tier in Tier},
            finished={tier: self._finished[tier] for tier in Tier},
            served_s=dict(self._served_s),
        )


@dataclass(frozen=True, slots=True)
class IngressBoard:
    """One ingress: its latest demand, and its latest report, which may be ``REPORT_S`` older."""

    demand: Demand
    report: QueueReport


@dataclass(frozen=True, slots=True)
class ModelBoard:
    """Everything there is to see of one model.

    Attributes:
        snapshot: the model as it is served now. The keys of its engines are in it.
        ingresses: those that are not silent, by name.
    """

    snapshot: ModelSnapshot
    ingresses: tuple[IngressBoard, ...]


@dataclass(slots=True)
class _Entry:
    board: IngressBoard
    heard: float


class ReportStore:
    """The latest word of every ingress. Kept by its Model actor."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def take(self, demand: Demand, report: QueueReport | None, now: float) -> None:
        """Take note of a renewal, with or without a report.

        An ingress is on the board once it has reported: where the Model was just started that
        takes up to ``REPORT_S``.
        """
        entry = self._entries.get(demand.ingress)
        if entry is not None:
            entry.board = IngressBoard(demand, report or entry.board.report)
            entry.heard = now
        elif report is not None:
            # Here too, lest the ingresses of years pile up where nobody ever looks.
            self._forget_silent(now)
            self._entries[demand.ingress] = _Entry(IngressBoard(demand, report), now)

    def ingresses(self, now: float) -> tuple[IngressBoard, ...]:
        """Return every ingress that was heard within ``SILENCE_S``, by name."""
        self._forget_silent(now)
        return tuple(entry.board for _, entry in sorted(self._entries.items()))

    def _forget_silent(self, now: float) -> None:
        entries = self._entries
        for name in [name for name, one in entries.items() if now - one.heard >= SILENCE_S]:
            del entries[name]
