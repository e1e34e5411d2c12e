"""Admission of requests to one model in this ingress: the scheduler on an event loop.

``Scheduler`` is a function of events and time; this gives it both: a future for each waiting
request, a timer for its next tick, and a wake-up for renewals of credits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from app import supervision
from app.config.queue import QueueSettings
from app.contracts.credits import Demand, Grant
from app.contracts.stats import REPORT_S, QueueReport
from app.contracts.status import Availability, ModelSnapshot, ReplicaStatus, Sleep
from app.core.dialect import Route
from app.core.tiers import Tier
from app.flow.credits import RENEWAL_S
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import Scheduler
from app.flow.slots import Offer
from app.flow.stats import Tally

_TICK_AGAIN_S: Final = 0.2


class Shed(Exception):
    """A request was turned away; its request says why."""

    def __init__(self, request: QueuedRequest) -> None:
        super().__init__(request.shed)
        self.request = request


@dataclass(frozen=True, slots=True)
class Slot:
    """The slot that a request was given.

    Attributes:
        replica: the engine replica that it is on.
        queued_as: the tier at which the request was queued: that which was asked for, or
            ``default`` where priority could not be delivered to it when it arrived.
        waited_s: how long the request waited for it, in seconds.
    """

    replica: ReplicaStatus
    queued_as: Tier
    waited_s: float


class ModelGone(Exception):
    """The model was removed while requests for it waited."""


class Admission:
    """One model's scheduler. Belongs to the event loop on which it was made."""

    def __init__(self, ingress: str) -> None:
        self._scheduler = Scheduler(ingress, QueueSettings())
        self._snapshot: ModelSnapshot | None = None
        self._replicas: dict[str, ReplicaStatus] = {}
        self._waiting: dict[QueuedRequest, asyncio.Future[Slot]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at = math.inf
        self._renewal_planned = -math.inf
        self._renewed_at = -math.inf
        self._renewal_sooner = asyncio.Event()
        self._woken = False
        self._waking = False
        self._suspects: dict[str, Route] = {}
        self._suspects_told: frozenset[str] = frozenset()
        self._closed = False
        self._tally = Tally()
        self._report_due = -math.inf

    @property
    def snapshot(self) -> ModelSnapshot:
        """The model as it was told last."""
        assert self._snapshot is not None, "nothing is admitted before the model is known"
        return self._snapshot

    @property
    def known(self) -> bool:
        """Whether the model has been told."""
        return self._snapshot is not None

    @property
    def ingresses(self) -> int:
        """How many ingresses share the model, as its Model said last."""
        return self._scheduler.credits.ingresses

    def update(self, snapshot: ModelSnapshot) -> None:
        """Take over what the model reports now."""
        now = time.monotonic()
        self._snapshot = snapshot
        self._sleep_state(snapshot.sleep, now)
        if snapshot.state is Availability.NOT_OFFERED:
            self._scheduler.withdraw(now)
        else:
            self._scheduler.offer()
        self._replicas = {status.replica_id: status for status in snapshot.replicas}
        offers = [_offer(status) for status in snapshot.replicas]
        # The scheduler's replicas first: with its old ones it would place requests on some that
        # have gone.
        self._call(self._scheduler.set_replicas, offers, snapshot.settings.tiers.priority, now)
        self._call(self._scheduler.configure, snapshot.settings.queue, now)

    def _sleep_state(self, sleep: Sleep | None, now: float) -> None:
        """Tell the scheduler whether the model is asleep, and since when it wakes."""
        if sleep is None:
            self._scheduler.wake()
        elif not sleep.waking:
            self._scheduler.sleep(sleep.start_s, None)
        elif not self._waking:
            self._scheduler.sleep(sleep.start_s, now)
        self._waking = sleep is not None and sleep.waking

    async def admit(self, request: QueuedRequest) -> Slot:
        """Wait for a slot, and return it.

        However this ends, ``end`` must be called for the request.

        Raises:
            Shed: the request is turned away.
            ModelGone: the model was removed.
        """
        self._call(self._scheduler.arrive, request, time.monotonic())
        self._tally.arrive(request)
        return await self._slot_of(request)

    async def admit_again(self, request: QueuedRequest, *, suspend: bool = True) -> Slot:
        """The same for a placed request whose replica failed; see ``Scheduler.lost``.

        It is shed at once where there is no other replica, and none is about to come.
        """
        self._call(partial(self._scheduler.lost, suspend=suspend), request, time.monotonic())
        return await self._slot_of(request)

    def has_another(self, request: QueuedRequest) -> bool:
        """Whether a placed request could go to another replica, now or later."""
        return self._replicas.keys() - request.without - {request.replica_id} != set()

    def end(self, request: QueuedRequest, tokens: int | None) -> None:
        """Let go of a request; ``tokens`` is what it took in all, if anybody knows.

        Called again it has no effect.
        """
        if request.state is RequestState.ENDED:
            return
        self._waiting.pop(request, None)
        now = time.monotonic()
        if request.state is RequestState.PLACED:
            self._tally.end(request, now)
        self._call(self._scheduler.end, request, now, tokens)

    def close(self) -> None:
        """Turn away whoever waits, or is to wait again, because the model was removed.

        What runs goes on.
        """
        self._closed = True
        for called in self._waiting.values():
            if not called.done():
                called.set_exception(ModelGone())
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def demand(self) -> Demand:
        """Return the demand to send to the Model now."""
        self._renewed_at = time.monotonic()
        demand = self._scheduler.demand(self._renewed_at)
        self._suspects_told = frozenset(self._suspects)
        return replace(demand, suspects=dict(self._suspects)) if self._suspects else demand

    def suspect(self, replica_id: str, route: Route) -> None:
        """Have the Model find out whether a replica hangs that gives no answers on a route."""
        self._suspects[replica_id] = route
        self._hasten()

    def report(self) -> QueueReport | None:
        """Return what to tell people now; ``None`` if that was done less than ``REPORT_S`` ago.

        It goes with the demand that was returned last.
        """
        now = self._renewed_at
        if now < self._report_due:
            return None
        self._report_due = now + REPORT_S
        scheduler = self._scheduler
        return self._tally.report(
            now,
            headroom=scheduler.credits.slot_table.headroom,
            grants_per_s={tier: scheduler.queue.grant_rate(tier, now) for tier in Tier},
        )

    def receive(self, grant: Grant) -> None:
        """Take a grant from the Model, which has heard the last demand."""
        for replica_id in self._suspects_told:
            self._suspects.pop(replica_id, None)
        self._call(self._scheduler.receive, grant, time.monotonic())

    def renewal_failed(self, demand: Demand) -> None:
        """Note that the Model could not be reached."""
        self._call(self._scheduler.renewal_failed, demand, time.monotonic())

    def renew_now(self) -> None:
        """Renew now: the Model says that another ingress needs credits, or that this one does."""
        self._woken = True
        self._renewal_sooner.set()

    async def wait_for_renewal(self) -> None:
        """Return when the next demand is due."""
        while not self._woken and (wait_s := self._renewal_at() - time.monotonic()) > 0:
            self._renewal_planned = self._renewal_at()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._renewal_sooner.wait()
            self._renewal_sooner.clear()
        self._woken = False

    def _renewal_at(self) -> float:
        """Return when the next demand is due, for itself or for what goes along with it."""
        at = self._scheduler.renewal_at()
        if self._suspects:
            at = min(at, self._renewed_at + RENEWAL_S)
        if self._tally.untold:
            at = min(at, max(self._renewed_at + RENEWAL_S, self._report_due))
        return at

    def _hasten(self) -> None:
        """Wake whoever waits for the next renewal if it has come to be due sooner."""
        if self._renewal_at() < self._renewal_planned:
            self._renewal_sooner.set()

    async def _slot_of(self, request: QueuedRequest) -> Slot:
        if self._closed and request.state is not RequestState.PLACED:
            raise ModelGone
        if request.state is RequestState.WAITING:
            called: asyncio.Future[Slot] = self._loop.create_future()
            self._waiting[request] = called
            return await called
        self._tally.count(request)
        if request.state is RequestState.SHED:
            # Nothing else tells of it: it has changed neither the queue nor what runs.
            self._hasten()
            raise Shed(request)
        return _slot(request, self._replicas[request.replica_id])

    def _call(self, event: Callable[..., Iterable[QueuedRequest]], *arguments: Any) -> None:
        """Pass an event to the scheduler, and tell waiting requests what it has made of them.

        They are told also where the scheduler fails: nobody else would.
        """
        requests: Iterable[QueuedRequest] = ()
        try:
            requests = event(*arguments)
        except Exception:
            requests = [t for t in self._waiting if t.state is not RequestState.WAITING]
            raise
        finally:
            self._tell(requests)
            self._arm()

    def _tell(self, requests: Iterable[QueuedRequest]) -> None:
        for request in requests:
            called = self._waiting.pop(request, None)
            if called is None or called.done():
                # Its client has gone: `end` is about to give back what it was given.
                continue
            self._tally.count(request)
            if request.state is RequestState.SHED:
                called.set_exception(Shed(request))
            elif (status := self._replicas.get(request.replica_id)) is not None:
                called.set_result(_slot(request, status))
            else:
                called.set_exception(LookupError("a request was placed on a replica unknown here"))

    def _arm(self) -> None:
        """Set the timer to the scheduler's next tick; hasten the renewal if it is due sooner."""
        at = self._scheduler.next_tick()
        if at != self._tick_at:
            self._set_timer(at)
        self._hasten()

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tick_at = at
        delay_s = max(0.0, at - time.monotonic())
        self._timer = self._loop.call_later(delay_s, self._tick) if at < math.inf else None

    def _tick(self) -> None:
        self._timer, self._tick_at = None, math.inf
        try:
            self._call(self._scheduler.tick, time.monotonic())
        except Exception as error:
            # The next event sets the timer again; a fault that is due at once must not spin.
            supervision.PROCESS.failed("queue timer", error, about=self.snapshot.id)
            self._set_timer(time.monotonic() + _TICK_AGAIN_S)


def _slot(request: QueuedRequest, replica: ReplicaStatus) -> Slot:
    return Slot(replica, request.tier, request.placed - request.arrived)


def _offer(status: ReplicaStatus) -> Offer:
    routes = frozenset(status.dialect.priority_routes)
    return Offer(status.replica_id, status.pool, status.slots, routes, status.weight)
