"""Reports of ingresses to a Model about its queue. Pure: the time is passed in.

Reports serve monitoring and the rates for autoscaling; credits depend on demands alone
(``app.flow.credits``). A report is sent with a demand, and repeats none of its fields. Counts only
grow while an ingress lives. Two reports of it thus yield true rates, however many were lost between
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.contracts.credits import Demand
from app.contracts.grown import set_grown_state
from app.contracts.slo import TierAttainment
from app.contracts.status import ModelSnapshot
from app.contracts.traffic import Traffic
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier

REPORT_S = 1.0
"""Shortest interval between two reports of an ingress, in seconds. Renewals are four a second under
load, and forty while priority waits; people read no faster than once a second."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """Requests of one tier that engines have suspended.

    Attributes:
        slots: how many slots they would take.
        oldest_s: for how long a replica has had some, at most, in seconds. Breaks of less than a
            second do not count.
    """

    slots: int = 0
    oldest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class QueueReport:
    """The queue of one model in one ingress. Counts start when the ingress begins to follow it.

    Attributes:
        at: when it was made, in seconds by the ingress's own clock.
        headroom: how many free slots the ingress keeps for priority.
        grants_per_s: how many requests per second received a slot recently, by tier; see
            ``RequestQueue.grant_rate``.
        placed: how many requests were placed, by tier, without replays.
        queued_s: the sum of their waits, in seconds, by tier.
        sheds: how many requests were shed, by tier and reason; pairs without any are left out.
        arrived: how many requests have arrived, by tier.
        finished: how many placed requests have ended, by tier, with whatever outcome.
        served_s: the sum of the times that these held a slot, in seconds, by tier.
        traffic: what has happened to the requests that have ended; ``None`` if the Model knows.
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
    traffic: Traffic | None = None


@dataclass(frozen=True, slots=True)
class IngressBoard:
    """One ingress: its latest demand, and its latest report, which may be ``REPORT_S`` older."""

    demand: Demand
    report: QueueReport


@dataclass(frozen=True, slots=True)
class ModelBoard:
    """Everything that monitoring shows of one model.

    Attributes:
        snapshot: the model as it is served now. It contains the keys of its engines.
        ingresses: the ingresses that are not silent, sorted by name.
        slo: how many streams met their objective, by tier; tiers without one are left out.
        downgrades: requests that were not served as requested, by reason, since the ingresses
            started.
    """

    snapshot: ModelSnapshot
    ingresses: tuple[IngressBoard, ...]
    slo: Mapping[Tier, TierAttainment] = field(default_factory=dict)
    downgrades: Mapping[str, int] = field(default_factory=dict)

    __setstate__ = set_grown_state
