"""What ingresses tell a Model about its queue. Pure: the time is passed in.

People look at it, and rates for autoscaling are made of it; credits go by demands alone
(``app.flow.credits``). A report rides along with a demand, and repeats nothing that stands in it.
Counts only grow while an ingress lives, so whoever compares two reports of it gets true rates,
however many were lost between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.contracts.credits import Demand
from app.contracts.status import ModelSnapshot
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier

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
