"""The numbers of one frame of ``frontline top``, computed from the Models' reports. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from app.contracts.slo import TierAttainment
from app.contracts.start import StartFailure
from app.contracts.stats import IngressBoard, ModelBoard, QueueReport
from app.contracts.status import Availability, ModelSnapshot, Preempted
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Sight:
    """A model application at one poll.

    Attributes:
        state: Serve's state of it, such as ``RUNNING``.
        board: its Model's report; ``None`` if it did not answer.
    """

    state: str
    board: ModelBoard | None


Look = Mapping[str, Sight]
"""All model applications at one moment, by name."""


@dataclass(frozen=True, slots=True)
class Sheds:
    """Requests that were shed for one reason.

    Attributes:
        total: how many since the start of the present ingresses.
        per_s: how many per second between two polls; ``None`` without an earlier poll.
    """

    total: int
    per_s: float | None


@dataclass(frozen=True, slots=True)
class TierRow:
    """One tier of a model, over all ingresses.

    Attributes:
        running: requests inside engines.
        waiting: requests in the queue.
        oldest_s: how long the oldest of them has waited, in seconds; 0 if none waits.
        queued_s: the average wait of requests placed between two polls, in seconds; ``None`` if
            none was placed.
        grants_per_s: requests that recently got a slot, per second: the drain rate.
        sheds: shed requests by reason; reasons without any are left out.
    """

    running: int
    waiting: int
    oldest_s: float
    queued_s: float | None
    grants_per_s: float
    sheds: Mapping[ShedReason, Sheds]


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One engine replica.

    Attributes:
        replica_id: its name.
        pool: the pool that it belongs to.
        engine: its engine's name.
        engine_version: the version that the engine reported.
        native_priority: whether native priority is in force on any route.
        preempts: whether its running requests give way to waiting ones of a better tier.
        preempted: what its engine has suspended; ``None`` if it does not report it.
        running: how many requests of all ingresses it runs.
        slots: how many requests it can run at once.
        credits: how many of its slots the ingresses hold credits for.
        draining: whether it is stopping and only finishes its requests. Then it has no slots, and
            only its name and its running requests are known.
    """

    replica_id: str
    pool: str
    engine: str
    engine_version: str
    native_priority: bool
    running: int
    slots: int
    credits: int
    draining: bool = False
    preempts: bool = False
    preempted: Preempted | None = None


@dataclass(frozen=True, slots=True)
class IngressRow:
    """The share of one ingress in a model."""

    ingress: str
    running: int
    waiting: int
    credits: int
    headroom: int


@dataclass(frozen=True, slots=True)
class ModelFrame:
    """One model.

    Attributes:
        application: the name of its Serve application.
        state: Serve's state of it; ``ASLEEP`` or ``WAKING`` if it was scaled to zero, ``FAILED``
            if its engines have failed to start.
        id: its name in requests; ``None`` if its Model did not answer. Then all following fields
            are empty.
        tiers: the tiers, from the front of the queue to its end.
        slots: the slots of all replicas.
        credits: how many of the slots the ingresses hold credits for.
        headroom: how many free slots the ingresses keep for priority.
        replicas: the ready replicas, then the draining ones.
        ingresses: the ingresses that still report.
        missing: for each pool that cannot be placed, the requirements that no node meets.
        failed: for each pool whose last start failed, why.
        slo: how many streams met the objective of their tier; tiers without one are left out.
        downgrades: requests that were not served as requested since the ingresses started, by
            reason.
        unloaded: for each LoRA adapter that a running engine failed to load, why.
    """

    application: str
    state: str
    id: str | None = None
    tiers: Mapping[Tier, TierRow] = field(default_factory=dict)
    slots: int = 0
    credits: int = 0
    headroom: int = 0
    replicas: tuple[ReplicaRow, ...] = ()
    ingresses: tuple[IngressRow, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, StartFailure] = field(default_factory=dict)
    slo: Mapping[Tier, TierAttainment] = field(default_factory=dict)
    downgrades: Mapping[str, int] = field(default_factory=dict)
    unloaded: Mapping[str, str] = field(default_factory=dict)


def make_frame(now: Look, before: Look) -> list[ModelFrame]:
    """Return every model, by application. Rates are measured since the poll ``before``."""
    return [
        _model(name, sight, earlier.board if (earlier := before.get(name)) else None)
        for name, sight in sorted(now.items())
    ]


def _model(application: str, sight: Sight, before: ModelBoard | None) -> ModelFrame:
    board = sight.board
    if board is None:
        return ModelFrame(application, sight.state)
    spans = _spans(board, before)
    replicas = _replicas(board)
    ingresses = tuple(_ingress(one) for one in board.ingresses)
    return ModelFrame(
        application,
        _state(board.snapshot, sight.state),
        id=board.snapshot.id,
        tiers={tier: _tier(tier, board.ingresses, spans) for tier in Tier},
        slots=sum(replica.slots for replica in replicas),
        credits=sum(ingress.credits for ingress in ingresses),
        headroom=sum(ingress.headroom for ingress in ingresses),
        replicas=replicas,
        ingresses=ingresses,
        missing=board.snapshot.missing,
        failed=board.snapshot.failed,
        slo=board.slo,
        downgrades=board.downgrades,
        unloaded={
            one.wanted.name: one.why_not
            for replica in board.snapshot.replicas
            for one in replica.adapters
            if one.why_not
        },
    )


def _state(snapshot: ModelSnapshot, of_serve: str) -> str:
    if snapshot.sleep is not None:
        return "WAKING" if snapshot.sleep.waking else "ASLEEP"
    return "FAILED" if snapshot.state is Availability.FAILED else of_serve


@dataclass(frozen=True, slots=True)
class _Span:
    """Two reports of one ingress."""

    first: QueueReport
    last: QueueReport

    @property
    def seconds(self) -> float:
        return self.last.at - self.first.at


def _spans(board: ModelBoard, before: ModelBoard | None) -> list[_Span]:
    """Pair the reports of each ingress. An ingress without a new report yields no rate."""
    if before is None:
        return []
    earlier = {one.demand.ingress: one.report for one in before.ingresses}
    pairs = ((earlier.get(one.demand.ingress), one.report) for one in board.ingresses)
    return [_Span(first, last) for first, last in pairs if first and last.at > first.at]


def _tier(tier: Tier, ingresses: Iterable[IngressBoard], spans: list[_Span]) -> TierRow:
    demands = [one.demand for one in ingresses]
    reports = [one.report for one in ingresses]
    return TierRow(
        running=sum(demand.running[tier] for demand in demands),
        waiting=sum(demand.waiting[tier] for demand in demands),
        oldest_s=max((demand.oldest_s[tier] for demand in demands), default=0.0),
        queued_s=_queued_s(tier, spans),
        grants_per_s=sum(report.grants_per_s[tier] for report in reports),
        sheds=_sheds(tier, reports, spans),
    )


def _queued_s(tier: Tier, spans: list[_Span]) -> float | None:
    placed = sum(span.last.placed[tier] - span.first.placed[tier] for span in spans)
    queued_s = sum(span.last.queued_s[tier] - span.first.queued_s[tier] for span in spans)
    return queued_s / placed if placed else None


def _sheds(tier: Tier, reports: list[QueueReport], spans: list[_Span]) -> dict[ShedReason, Sheds]:
    sheds = {}
    for reason in ShedReason:
        key = (tier, reason)
        if total := sum(report.sheds.get(key, 0) for report in reports):
            rates = [
                (span.last.sheds.get(key, 0) - span.first.sheds.get(key, 0)) / span.seconds
                for span in spans
            ]
            sheds[reason] = Sheds(total, sum(rates) if rates else None)
    return sheds


def _replicas(board: ModelBoard) -> tuple[ReplicaRow, ...]:
    credits: Counter[str] = Counter()
    running: Counter[str] = Counter()
    for ingress in board.ingresses:
        for replica_id, (held, used) in ingress.demand.held.items():
            credits[replica_id] += held
            running[replica_id] += used
    ready = {status.replica_id: status for status in board.snapshot.replicas}
    draining = sorted(one for one in running if running[one] and one not in ready)
    rows = [
        ReplicaRow(
            replica_id=status.replica_id,
            pool=status.pool,
            engine=status.dialect.engine,
            engine_version=status.engine_version,
            native_priority=status.dialect.native_priority,
            running=running[status.replica_id],
            slots=status.slots,
            credits=credits[status.replica_id],
            preempts=status.preempts,
            preempted=status.preempted,
        )
        for status in ready.values()
    ]
    return (*rows, *(_draining(one, running[one]) for one in draining))


def _draining(replica_id: str, running: int) -> ReplicaRow:
    return ReplicaRow(replica_id, "", "", "", False, running, slots=0, credits=0, draining=True)


def _ingress(board: IngressBoard) -> IngressRow:
    demand = board.demand
    return IngressRow(
        ingress=demand.ingress,
        running=sum(demand.running.values()),
        waiting=sum(demand.waiting.values()),
        credits=sum(held for held, _ in demand.held.values()),
        headroom=board.report.headroom,
    )
