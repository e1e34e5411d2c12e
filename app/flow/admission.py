"""Admission of requests to one model in this ingress: the scheduler on an event loop.

``Scheduler`` is a function of events and time. ``Admission`` supplies both: a future for each
waiting request, a timer for the next tick, and a wakeup for renewals of credits.
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
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier
from app.flow.credits import RENEWAL_S
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import Scheduler
from app.flow.slots import Offer
from app.flow.stats import PoolSlots, QueueState, Tally

_TICK_AGAIN_S: Final = 0.2
# States in which no engine can be expected.
_HOPELESS: Final = {
    Availability.NOT_OFFERED: ShedReason.NOT_OFFERED,
    Availability.FAILED: ShedReason.ENGINE_FAILED,
}


class Shed(Exception):
    """A request was shed; ``request.shed`` has the reason."""

    def __init__(self, request: QueuedRequest) -> None:
        super().__init__(request.shed)
        self.request = request


@dataclass(frozen=True, slots=True)
class Slot:
    """The slot that a request received.

    Attributes:
        replica: the engine replica of the slot.
        queued_as: the tier at which the request was queued: the requested one; ``default`` if
            priority could not be delivered to it when it arrived; or the one that it was raised to.
        waited_s: how long the request waited for the slot, in seconds.
        raised: whether it had not started in time, and was raised.
    """

    replica: ReplicaStatus
    queued_as: Tier
    waited_s: float
    raised: bool = False


class ModelGone(Exception):
    """The model was removed while requests for it waited."""


class Admission:
    """One model's scheduler, on the event loop that created it."""

    def __init__(self, ingress: str) -> None:
        self._scheduler = Scheduler(ingress, QueueSettings())
        self._snapshot: ModelSnapshot | None = None
        self._replicas: dict[str, ReplicaStatus] = {}
        self._lacking: dict[tuple[Route, str], frozenset[str]] = {}
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
        self._suspects_sent: frozenset[str] = frozenset()
        self._closed = False
        self._tally = Tally()
        self._report_due = -math.inf

    @property
    def snapshot(self) -> ModelSnapshot:
        """The model's latest snapshot."""
        assert self._snapshot is not None, "nothing is admitted before the model is known"
        return self._snapshot

    @property
    def known(self) -> bool:
        """Whether a snapshot of the model has arrived."""
        return self._snapshot is not None

    @property
    def ingresses(self) -> int:
        """How many ingresses share the model, by the last grant."""
        return self._scheduler.credits.ingresses

    def update(self, snapshot: ModelSnapshot) -> None:
        """Apply a new snapshot of the model."""
        now = time.monotonic()
        self._snapshot = snapshot
        self._sleep_state(snapshot.sleep, now)
        if (reason := _HOPELESS.get(snapshot.state)) is None:
            self._scheduler.offer()
        else:
            self._scheduler.withdraw(now, reason)
        self._replicas = {status.replica_id: status for status in snapshot.replicas}
        self._lacking = {}
        offers = [_offer(status) for status in snapshot.replicas]
        # Replicas before settings: with the old replicas, the scheduler would place requests on
        # replicas that are gone.
        self._call(self._scheduler.set_replicas, offers, snapshot.settings.tiers.priority, now)
        self._call(self._scheduler.configure, snapshot.settings.queue, now)

    def _sleep_state(self, sleep: Sleep | None, now: float) -> None:
        """Pass to the scheduler whether the model is asleep, and since when it wakes."""
        if sleep is None:
            self._scheduler.wake()
        elif not sleep.waking:
            self._scheduler.sleep(sleep.start_s, None)
        elif not self._waking:
            self._scheduler.sleep(sleep.start_s, now)
        self._waking = sleep is not None and sleep.waking

    async def admit(self, request: QueuedRequest) -> Slot:
        """Wait for a slot, and return it.

        In every case ``end`` must be called for the request.

        Raises:
            Shed: the request is shed.
            ModelGone: the model was removed.
        """
        self._call(self._scheduler.arrive, request, time.monotonic())
        self._tally.arrive(request)
        return await self._slot_of(request)

    async def admit_again(self, request: QueuedRequest, *, suspend: bool = True) -> Slot:
        """Do the same for a placed request whose replica failed; see ``Scheduler.lost``.

        The request is shed at once if there is no other replica and none is expected.
        """
        self._call(partial(self._scheduler.lost, suspend=suspend), request, time.monotonic())
        return await self._slot_of(request)

    def lacking(self, route: Route, adapter: str = "") -> frozenset[str]:
        """Return the ids of the ready replicas whose engine lacks a route, or the adapter on it."""
        found = self._lacking.get((route, adapter))
        if found is None:
            # Worked out when first asked: a model may have hundreds of adapters.
            found = self._lacking[route, adapter] = frozenset(
                status.replica_id
                for status in self.snapshot.replicas
                if not status.dialect.serves(route, adapter)
            )
        return found

    def serving(self, route: Route, adapter: str = "") -> list[ReplicaStatus]:
        """Return the ready replicas whose engine has a route, and the adapter on it."""
        lacking = self.lacking(route, adapter)
        return [one for one in self.snapshot.replicas if one.replica_id not in lacking]

    def delivers_priority(self, route: Route) -> bool:
        """Whether a new request could be served as priority on a route, as far as is known."""
        return self._scheduler.delivers_priority(route)

    def has_another(self, request: QueuedRequest) -> bool:
        """Whether a placed request could go to another replica, now or later."""
        return self._replicas.keys() - request.without - {request.replica_id} != set()

    def end(self, request: QueuedRequest, tokens: int | None) -> None:
        """End a request; ``tokens`` is how many it used in all, ``None`` if unknown. Idempotent."""
        if request.state is RequestState.ENDED:
            return
        self._waiting.pop(request, None)
        now = time.monotonic()
        if request.state is RequestState.PLACED:
            self._tally.end(request, now)
        self._call(self._scheduler.end, request, now, tokens)

    def close(self) -> None:
        """Fail requests that wait, or would wait again, because the model was removed.

        They get ``ModelGone``. Running requests go on.
        """
        self._closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ModelGone())
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def demand(self) -> Demand:
        """Return the demand to send to the Model now."""
        self._renewed_at = time.monotonic()
        demand = self._scheduler.demand(self._renewed_at)
        self._suspects_sent = frozenset(self._suspects)
        return replace(demand, suspects=dict(self._suspects)) if self._suspects else demand

    def suspect(self, replica_id: str, route: Route) -> None:
        """Report a replica that does not answer on a route; the Model checks whether it hangs."""
        self._suspects[replica_id] = route
        self._hasten()

    def report(self) -> QueueReport | None:
        """Return the report that is due; ``None`` if the last one is less than ``REPORT_S`` old.

        It is sent with the demand that was returned last.
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

    def state(self) -> QueueState:
        """Return the state of the queue now."""
        now, scheduler = time.monotonic(), self._scheduler
        queue, credits = scheduler.queue, scheduler.credits
        pools: dict[str, PoolSlots] = {}
        for one in credits.slot_table:
            slots = PoolSlots(one.credit, one.running, one.free)
            pools[one.kind.pool] = pools.get(one.kind.pool, PoolSlots()) + slots
        return QueueState(
            waiting={tier: queue.wanted(tier) for tier in Tier},
            oldest_s={tier: queue.oldest_s(tier, now) for tier in Tier},
            running=credits.running,
            sheds=self._tally.sheds,
            preemptions={tier: credits.preemptions[tier] for tier in Tier},
            pools=pools,
        )

    def receive(self, grant: Grant) -> None:
        """Apply a grant from the Model, which has received the last demand."""
        for replica_id in self._suspects_sent:
            self._suspects.pop(replica_id, None)
        self._call(self._scheduler.receive, grant, time.monotonic())

    def renewal_failed(self, demand: Demand) -> None:
        """Record that the Model could not be reached."""
        self._call(self._scheduler.renewal_failed, demand, time.monotonic())

    def renew_now(self) -> None:
        """Renew now: the Model reports that this ingress or another one needs credits."""
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
        """Return when the next demand is due, also for the report and the suspects it carries."""
        at = self._scheduler.renewal_at()
        if self._suspects:
            at = min(at, self._renewed_at + RENEWAL_S)
        if self._tally.unreported:
            at = min(at, max(self._renewed_at + RENEWAL_S, self._report_due))
        return at

    def _hasten(self) -> None:
        """Wake ``wait_for_renewal`` if the next renewal has become due sooner."""
        if self._renewal_at() < self._renewal_planned:
            self._renewal_sooner.set()

    async def _slot_of(self, request: QueuedRequest) -> Slot:
        if self._closed and request.state is not RequestState.PLACED:
            raise ModelGone
        if request.state is RequestState.WAITING:
            future: asyncio.Future[Slot] = self._loop.create_future()
            self._waiting[request] = future
            return await future
        self._tally.count(request)
        if request.state is RequestState.SHED:
            # Nothing else reports it, as neither the queue nor a running request has changed.
            self._hasten()
            raise Shed(request)
        return _slot(request, self._replicas[request.replica_id])

    def _call(self, event: Callable[..., Iterable[QueuedRequest]], *arguments: Any) -> None:
        """Pass an event to the scheduler, and resolve the futures of requests that it changed.

        They are resolved even if the scheduler fails, because nothing else would do it.
        """
        requests: Iterable[QueuedRequest] = ()
        try:
            requests = event(*arguments)
        except Exception:
            requests = [t for t in self._waiting if t.state is not RequestState.WAITING]
            raise
        finally:
            self._resolve(requests)
            self._arm()

    def _resolve(self, requests: Iterable[QueuedRequest]) -> None:
        for request in requests:
            future = self._waiting.pop(request, None)
            if future is None or future.done():
                # Its client has gone: `end` is about to free its slot.
                continue
            self._tally.count(request)
            if request.state is RequestState.SHED:
                future.set_exception(Shed(request))
            elif (status := self._replicas.get(request.replica_id)) is not None:
                future.set_result(_slot(request, status))
            else:
                future.set_exception(LookupError("a request was placed on a replica unknown here"))

    def _arm(self) -> None:
        """Set the timer to the scheduler's next tick; wake the renewal if it is due sooner."""
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
            # The next event sets the timer again. A repeated fault must not spin.
            supervision.PROCESS.failed("queue timer", error, about=self.snapshot.id)
            self._set_timer(time.monotonic() + _TICK_AGAIN_S)


def _slot(request: QueuedRequest, replica: ReplicaStatus) -> Slot:
    waited_s = request.placed - request.arrived
    return Slot(replica, request.tier, waited_s, raised=request.raised_from is not None)


def _offer(status: ReplicaStatus) -> Offer:
    routes = frozenset(status.dialect.priority_routes)
    return Offer(
        status.replica_id,
        status.pool,
        status.slots,
        routes,
        status.weight,
        preempts=status.preempts,
    )
