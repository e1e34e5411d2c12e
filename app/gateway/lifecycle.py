"""The lifecycle of one request: charged, queued, placed, sent, forwarded, recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace

from app.contracts.status import Availability, ReplicaStatus
from app.core import errors
from app.core.shed_reason import ShedReason
from app.core.tier_decision import TierAdmission, TierDecision, TierRights, admit, decide
from app.core.tiers import PriorityMode, Tier
from app.flow.admission import Admission, ModelGone, Shed, Slot
from app.flow.request import QueuedRequest
from app.gateway.forwarding import Forwarding
from app.gateway.keep_alive import KeepAlive, comments_meanwhile
from app.gateway.metering import Meter
from app.gateway.refusals import (
    NOT_READY,
    error_of,
    not_offered,
    not_ready,
    reason_of,
    unrecordable,
)
from app.gateway.response import Placement, Reply, milliseconds
from app.gateway.services import Services
from app.ledger.ledger import JournalFull, Unrecordable
from app.ledger.record import Origin, State, now_utc
from app.protocol.requests import Inbound, rewrite_request
from app.tenants.access import Caller
from app.tenants.priority_share import SharePart
from app.upstream.client import EngineFailed, EngineUnreachable


class Lifecycle:
    """One request to one model, from its arrival to the last byte of its answer.

    In every case its slot is given back. A request that was placed on an engine replica gets
    exactly one settled record.
    """

    def __init__(
        self,
        services: Services,
        admission: Admission,
        caller: Caller,
        inbound: Inbound,
        reply: Reply,
    ) -> None:
        self._access = services.access
        self._caller = caller
        self._admission = admission
        self._inbound = inbound
        self._reply = reply
        self._engines = services.engines
        # The settings in force at the arrival apply to the whole request.
        self._settings = services.settings
        self._meter = Meter(services.current_ledger, self._origin())
        self._part: SharePart | None = None
        # The tokens that count against the key's limit if the usage stays unknown, and the tokens
        # that were used.
        self._presumed_tokens = 0
        self._used_tokens: int | None = None
        self._waited_s = 0.0

    async def run(self) -> None:
        """Answer the request.

        Each step releases what it has acquired, in reverse order, whether or not others fail.

        Raises:
            ApiError: the request is not answered; nothing has been sent yet.
        """
        with self._counted_in_flight():
            self._require_engines()
            async with self._charged() as admitted:
                with self._queued(admitted) as request:
                    slot = await self._wait_for_slot(request)
                    async with self._recorded():
                        await self._answer(request, slot, admitted)

    def _counted_in_flight(self) -> AbstractContextManager[None]:
        """Count the request as in flight for its key and tenant."""
        if self._access is None:
            return nullcontext()
        try:
            return self._access.flight(self._caller, self._settings.in_flight)
        except errors.TooManyInFlight as error:
            self._meter.turn_away(State.REFUSED, reason_of(error))
            raise

    def _require_engines(self) -> None:
        """Refuse the request if no engine can serve it, and none is about to."""
        model, name = self._admission.snapshot, self._inbound.model
        if model.state is Availability.NOT_OFFERED:
            self._meter.turn_away(State.REFUSED, Availability.NOT_OFFERED.value)
            raise not_offered(name)
        if not model.replicas and model.sleep is None:
            self._meter.turn_away(State.REFUSED, NOT_READY)
            raise not_ready(name)

    @asynccontextmanager
    async def _charged(self) -> AsyncIterator[TierAdmission]:
        """Charge the request to its key's limits, and correct the charge by the tokens used.

        Yields the tier that the model and the key allow.
        """
        requested = self._inbound.requested_tier
        default_tier = self._caller.default_tier or self._settings.default_tier
        offer = self._admission.snapshot.settings.tiers.offer
        if self._access is None:
            yield admit(requested, default_tier, offer)
            return
        since, expected = time.monotonic(), self._inbound.expected_tokens
        try:
            await self._access.charge(self._caller, expected)
        except errors.RateLimited as error:
            self._meter.turn_away(State.REFUSED, reason_of(error))
            raise
        try:
            self._reply.headers = self._access.headers(self._caller)
            with self._priority_part(requested or default_tier) as rights:
                yield admit(requested, default_tier, offer, rights)
        finally:
            used = self._presumed_tokens if self._used_tokens is None else self._used_tokens
            age_s = time.monotonic() - since
            self._access.put_right(self._caller, expected, used, age_s)

    @contextmanager
    def _priority_part(self, wanted: Tier) -> Iterator[TierRights]:
        """Count the request in its key's priority share. Yields the tiers that the key may use."""
        assert self._access is not None
        rights, self._part = self._access.rights(self._caller, wanted)
        try:
            yield rights
        finally:
            if self._part is not None:
                self._part.end()

    @contextmanager
    def _queued(self, admitted: TierAdmission) -> Iterator[QueuedRequest]:
        """Yield the request for the queue; at the end remove it or give its slot back."""
        request = QueuedRequest(
            tier=admitted.tier,
            tenant=self._caller.tenant,
            tokens=self._inbound.expected_tokens,
            route=self._inbound.route,
            prefix=self._inbound.prefix,
            fail_fast=self._inbound.fail_fast,
            sequences=self._inbound.sequences,
        )
        try:
            yield request
        finally:
            # The slot is given back even if counting tokens fails.
            try:
                self._used_tokens = self._count_tokens()
            finally:
                self._admission.end(request, self._used_tokens)

    async def _wait_for_slot(self, request: QueuedRequest) -> Slot:
        try:
            slot = await self._admission.admit(request)
        except (ModelGone, Shed) as turned_away:
            error = self._refusal(turned_away)
            self._meter.turn_away(State.SHED, reason_of(error))
            raise error from None
        self._waited_s = slot.waited_s
        return slot

    @asynccontextmanager
    async def _recorded(self) -> AsyncIterator[None]:
        """Record the outcome of a placed request."""
        try:
            # Reserved only now: queued requests need no room in the journal, and may be very many.
            with self._meter.reserved():
                yield
        except JournalFull:
            # No engine has received it, so there is no record yet to write off.
            refusal = unrecordable()
            self._meter.turn_away(State.REFUSED, reason_of(refusal))
            raise refusal from None
        except Unrecordable:
            refusal = unrecordable()
            self._meter.write_off(reason_of(refusal))
            raise refusal from None
        except (EngineUnreachable, EngineFailed, errors.ApiError, ModelGone, Shed) as failure:
            error = self._refusal(failure)
            if isinstance(error, errors.EngineRejected | errors.EngineBusy):
                # The engine's answer means that it has generated nothing.
                self._presumed_tokens = 0
            await self._meter.settle(State.FAILED, reason_of(error))
            raise error from None
        except asyncio.CancelledError:
            await self._meter.settle(State.INTERRUPTED, "client_gone")
            raise
        except BaseException:
            await self._meter.settle(State.FAILED, "internal_error")
            raise

    async def _answer(self, request: QueuedRequest, slot: Slot, admitted: TierAdmission) -> None:
        """Answer the request, on another replica if the first is lost or fails before an answer.

        Once a stream has begun, its tier is final. Then the other replica must honour it too.
        """
        decision = self._decide(admitted, slot)
        try:
            await self._send(request, slot, decision)
            return
        except (EngineUnreachable, EngineFailed) as failure:
            slot = await self._another_slot(request, failure, decision)
        self._waited_s = slot.waited_s
        if not self._still_holds(decision, slot.replica):
            # The prices of the first decision stay: later increases do not apply to this request.
            decision = replace(self._decide(admitted, slot), rate_card=decision.rate_card)
        await self._send(request, slot, decision)

    async def _another_slot(
        self,
        request: QueuedRequest,
        failed: EngineUnreachable | EngineFailed,
        decision: TierDecision,
    ) -> Slot:
        """Do the same as ``_slot_after``, for a stream that may have begun."""
        async with comments_meanwhile(self._reply, self._settings.stream_comment_s):
            slot = await self._slot_after(request, failed)
        if self._reply.started and not self._still_holds(decision, slot.replica):
            raise failed
        return slot

    async def _slot_after(
        self, request: QueuedRequest, failed: EngineUnreachable | EngineFailed
    ) -> Slot:
        """Wait for a slot on a replica other than the one that failed the request.

        Raises:
            EngineFailed: there is no other replica, or none any more.
            Shed, ModelGone: as in ``Admission.admit``.
        """
        if isinstance(failed, EngineUnreachable):
            # A replica that still serves other requests keeps getting requests.
            suspend = failed.silent or not failed.timed_out
            return await self._admission.admit_again(request, suspend=suspend)
        # The request itself may cause the failure. So the replica keeps getting other requests,
        # and if there is no other replica the failure is the answer.
        if not self._admission.has_another(request):
            raise failed
        try:
            return await self._admission.admit_again(request, suspend=False)
        except Shed as shed:
            if shed.request.shed is ShedReason.NO_OTHER_REPLICA:
                raise failed from None
            raise

    def _decide(self, admitted: TierAdmission, slot: Slot) -> TierDecision:
        model = self._admission.snapshot.settings
        decision = decide(
            admitted,
            queued_as=slot.queued_as,
            offer=model.tiers.offer,
            native_priority=slot.replica.dialect.native_priority,
            route_honoured=slot.replica.honours_priority(self._inbound.route),
            rate_card=model.rate_card,
        )
        if self._part is not None:
            self._part.decide(time.monotonic(), priority=decision.served is Tier.PRIORITY)
        return decision

    def _still_holds(self, decision: TierDecision, replica: ReplicaStatus) -> bool:
        """Return whether a decision stays valid on a replica other than the one it was made for."""
        in_queue = self._admission.snapshot.settings.tiers.priority is PriorityMode.QUEUE
        honoured = replica.honours_priority(self._inbound.route)
        return decision.served is not Tier.PRIORITY or in_queue or honoured

    async def _send(self, request: QueuedRequest, slot: Slot, decision: TierDecision) -> None:
        """Send the request to the engine of its slot, and forward the answer to the client."""
        inbound, replica, settings = self._inbound, slot.replica, self._settings
        place = Placement(replica, decision, slot.waited_s)
        self._meter.place(place)
        self._presumed_tokens = inbound.expected_tokens
        if inbound.stream:
            self._meter.open()

        def suspect() -> None:
            self._admission.suspect(replica.replica_id, inbound.route)

        def suspect_if_silent() -> None:
            if self._engines.is_silent(replica.replica_id, settings.stream_timeout_s):
                suspect()

        try:
            answer = await self._engines.send(
                replica,
                inbound.route,
                rewrite_request(
                    inbound, self._admission.snapshot.id, replica.dialect, decision.served
                ),
                request_id=self._reply.request_id,
                read_timeout_s=self._longest_silence_s(place),
                silence=self._keep_alive(place, suspect_if_silent) if inbound.stream else None,
            )
        except EngineUnreachable as lost:
            if lost.silent:
                suspect()
            raise
        forwarding = Forwarding(
            inbound,
            self._reply,
            self._meter,
            slow_reader_s=settings.slow_reader_s,
            free_slot=lambda: self._admission.end(request, self._count_tokens()),
            suspect=suspect,
        )
        await forwarding.forward(answer, place)

    def _keep_alive(self, place: Placement, suspect: Callable[[], None]) -> KeepAlive:
        now = asyncio.get_running_loop().time
        return KeepAlive(self._reply, self._meter, place, self._settings, suspect, now)

    def _longest_silence_s(self, place: Placement) -> float:
        settings = self._settings
        if not self._inbound.stream:
            return settings.engine_timeout_s
        if place.may_be_suspended:
            return max(settings.suspended_timeout_s, settings.stream_timeout_s)
        return settings.stream_timeout_s

    def _count_tokens(self) -> int | None:
        usage = self._meter.usage
        return None if usage is None else usage.prompt_tokens + usage.completion_tokens

    def _refusal(self, failure: Exception) -> errors.ApiError:
        """Return the error for the client, with the time that the request waited as a header."""
        if isinstance(failure, Shed):
            self._waited_s = time.monotonic() - failure.request.arrived
        error = error_of(failure, self._inbound.model)
        error.headers["x-queue-time-ms"] = milliseconds(self._waited_s)
        return error

    def _origin(self) -> Origin:
        return Origin(
            request_id=self._reply.request_id,
            tenant=self._caller.tenant,
            key_id=self._caller.key_id,
            model=self._admission.snapshot.id,
            route=self._inbound.route.value,
            stream=self._inbound.stream,
            requested=self._inbound.requested_tier,
            arrived=now_utc(),
        )
