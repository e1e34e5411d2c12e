"""The lifecycle of one request: charged, queued, placed, sent, forwarded, recorded."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from app.contracts.status import Availability, ReplicaStatus
from app.core import errors
from app.core.shed_reason import ShedReason
from app.core.tier_decision import (
    ALL_RIGHTS,
    TierAdmission,
    TierDecision,
    TierRights,
    admit,
    admit_raised,
    decide,
    keeps_to_tier,
)
from app.core.tiers import PriorityMode, Tier, TierReason
from app.flow.admission import Admission, ModelGone, Shed, Slot
from app.flow.request import QueuedRequest
from app.gateway.forwarding import Forwarding
from app.gateway.keep_alive import KeepAlive, Suspicion, comments_meanwhile
from app.gateway.metering import Meter
from app.gateway.refusals import (
    error_of,
    failed_to_start,
    not_offered,
    not_ready,
    reason_of,
    tier_unavailable,
    unrecordable,
)
from app.gateway.response import Placement, Reply, milliseconds
from app.gateway.services import Services
from app.ledger.ledger import JournalFull, Unrecordable
from app.ledger.record import Origin, State, now_utc
from app.observe.observers import (
    CLIENT_GONE,
    CLIENT_GONE_STATUS,
    INTERNAL_ERROR,
    NO_CONTEXT,
    Context,
)
from app.protocol.requests import Inbound, priority_header, rewrite_request
from app.tenants.access import Access, Caller
from app.tenants.priority_share import SharePart
from app.upstream.client import EngineFailed, EngineUnreachable
from app.upstream.silence import Silence


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
        context: Context = NO_CONTEXT,
    ) -> None:
        self._access, self._budgets = services.access, services.budgets
        self._ingress = services.registry.ingress
        self._caller = caller
        self._admission = admission
        self._inbound = inbound
        # The adapter that the request names; empty if it names the model itself.
        self._adapter = admission.snapshot.adapter(inbound.model)
        self._reply = reply
        self._engines = services.engines
        self._trace = context.trace
        # The settings in force at the arrival apply to the whole request.
        self._settings = services.settings
        self._meter = Meter(services.current_ledger, self._origin(), services.observers, context)
        self._part: SharePart | None = None
        # The tier at which it goes on if it does not start in time; `None`: at the same one.
        self._raised: TierAdmission | None = None
        # The tokens that count against the key's limit if the usage stays unknown, and the tokens
        # that were used.
        self._presumed_tokens = 0
        self._used_tokens: int | None = None
        self._waited_s = 0.0

    async def run(self) -> None:
        """Answer the request: charge it, queue it, record it, answer it.

        Each of these steps calls the next and then releases what it has acquired, whether or not
        others fail. (Contexts made of generators would cost a tenth of the whole request.)

        Observers are told also of a request that ends before it is refused or placed.

        Raises:
            ApiError: the request is not answered; nothing has been sent yet.
        """
        try:
            with self._counted_in_flight():
                self._require_engines()
                await self._charge()
        except asyncio.CancelledError:
            self._meter.abandon(CLIENT_GONE, CLIENT_GONE_STATUS)
            raise
        except errors.ApiError as error:
            self._meter.abandon(reason_of(error), error.status)
            raise
        except BaseException:
            self._meter.abandon(INTERNAL_ERROR, 500)
            raise

    def _counted_in_flight(self) -> AbstractContextManager[None]:
        """Count the request as in flight for its key and tenant."""
        if self._access is None:
            return nullcontext()
        try:
            return self._access.flight(self._caller, self._settings.in_flight)
        except errors.TooManyInFlight as error:
            self._turned_away(State.REFUSED, error)
            raise

    def _require_engines(self) -> None:
        """Refuse the request if no engine can serve it, and none is about to."""
        model, name = self._admission.snapshot, self._inbound.model
        state = model.state
        error: errors.ApiError
        if state is Availability.NOT_OFFERED:
            error = not_offered(name)
        elif state is Availability.FAILED:
            error = failed_to_start(name, model.failure_reason)
        elif not model.replicas and model.sleep is None:
            error = not_ready(name)
        elif not model.has_prices_for(self._inbound.route, self._adapter):
            error = errors.UnsupportedEndpoint()
        elif model.replicas and not self._is_served():
            # An engine of another pool may have the route, or is about to load the adapter.
            later = bool(model.pools_to_come) or model.awaits_adapter(self._adapter)
            error = not_ready(name) if later else errors.UnsupportedEndpoint()
        else:
            return
        self._turned_away(State.REFUSED, error)
        raise error

    def _is_served(self) -> bool:
        """Return whether some ready replica's engine has the request's route and adapter."""
        lacking = self._admission.lacking(self._inbound.route, self._adapter)
        return len(lacking) < len(self._admission.snapshot.replicas)

    async def _charge(self) -> None:
        """Hold the request to budgets and charge it to its key's limits.

        The charge is corrected by the tokens used.
        """
        access, caller = self._access, self._caller
        if access is None:
            await self._serve(self._admit(ALL_RIGHTS))
            return
        since, expected = time.monotonic(), self._inbound.expected_tokens
        try:
            if self._budgets is not None:
                await self._budgets.require(caller.key)
            await access.charge(caller, expected)
        except (errors.RateLimited, errors.InsufficientQuota, errors.Unavailable) as error:
            self._turned_away(State.REFUSED, error)
            raise
        try:
            self._reply.headers += access.headers(caller)
            await self._share_priority(access)
        finally:
            used = self._presumed_tokens if self._used_tokens is None else self._used_tokens
            access.put_right(caller, expected, used, time.monotonic() - since)

    async def _share_priority(self, access: Access) -> None:
        """Count the request in its key's priority share.

        One that may be raised to priority counts as one that wants priority, from its arrival on.
        """
        wanted = Tier.PRIORITY if self._may_become_priority else self._wanted_tier
        rights, self._part = access.rights(self._caller, wanted)
        try:
            await self._serve(self._admit(rights))
        finally:
            if self._part is not None:
                self._part.end()

    @property
    def _default_tier(self) -> Tier:
        return self._caller.default_tier or self._settings.default_tier

    @property
    def _wanted_tier(self) -> Tier:
        return self._inbound.requested_tier or self._default_tier

    @property
    def _may_be_raised(self) -> bool:
        """Whether it has a deadline. Priority has nothing to be raised to."""
        inbound = self._inbound
        has_deadline = inbound.start_within_s is not None and inbound.route.takes_slot
        return has_deadline and self._wanted_tier is not Tier.PRIORITY

    @property
    def _may_become_priority(self) -> bool:
        return self._may_be_raised and self._inbound.start_within_tier is Tier.PRIORITY

    def _admit(self, rights: TierRights) -> TierAdmission:
        """Return the tier that the model and the key allow."""
        inbound, offer = self._inbound, self._admission.snapshot.settings.tiers.offer
        admitted = admit(
            inbound.requested_tier, self._default_tier, offer, rights, inbound.tier_reason
        )
        if self._may_be_raised:
            raised = admit_raised(admitted, inbound.start_within_tier, offer, rights)
            # A request that insists is raised to the tier that it names, or not at all.
            if raised is not None and self._keeps_to_tier(raised.reason):
                self._raised = raised
        return admitted

    def _require_tier(self, admitted: TierAdmission) -> None:
        """Refuse the request if it insists on a tier that it would not get.

        Priority that cannot be delivered now is refused at once, and not after waiting for a slot.
        """
        reason = admitted.reason
        route = self._inbound.route
        if admitted.tier is Tier.PRIORITY and not self._admission.delivers_priority(route):
            reason = TierReason.NO_REPLICA_HONOURS_PRIORITY
            if any(one.dialect.native_priority for one in self._admission.snapshot.replicas):
                reason = TierReason.ROUTE_DOES_NOT_HONOUR_PRIORITY
        self._insist(reason)

    def _insist(self, reason: TierReason | None) -> None:
        if reason is None or self._keeps_to_tier(reason):
            return
        error = tier_unavailable(reason)
        if not self._meter.placed:
            self._turned_away(State.REFUSED, error)
        raise error

    def _keeps_to_tier(self, reason: TierReason | None) -> bool:
        inbound, strict = self._inbound, self._admission.snapshot.settings.tiers.strict
        return keeps_to_tier(
            inbound.requested_tier, reason, strict=strict, required=inbound.require_tier
        )

    def _serve(self, admitted: TierAdmission) -> Awaitable[None]:
        """Answer the request in a slot, or without one if its route needs none."""
        if self._inbound.route.takes_slot or not self._is_served():
            return self._queue(admitted)
        return self._answer_without_slot(admitted)

    async def _queue(self, admitted: TierAdmission) -> None:
        """Queue the request until it has a slot; at the end remove it or give its slot back."""
        self._require_tier(admitted)
        takes_slot, raised = self._inbound.route.takes_slot, self._raised
        start_within_s = self._inbound.start_within_s if raised else None
        request = QueuedRequest(
            # Only while the model wakes are requests queued that generate nothing.
            tier=admitted.tier if takes_slot else Tier.DEFAULT,
            tenant=self._caller.tenant,
            tokens=self._inbound.expected_tokens,
            route=self._inbound.route,
            prefix=self._prefix(),
            fail_fast=self._inbound.fail_fast,
            sequences=self._inbound.sequences,
            start_within_s=math.inf if start_within_s is None else start_within_s,
            raise_to=Tier.DEFAULT if raised is None else raised.tier,
            raise_only=raised is not None
            and not self._keeps_to_tier(TierReason.NO_REPLICA_HONOURS_PRIORITY),
            without=self._admission.lacking(self._inbound.route, self._adapter),
        )
        try:
            slot = await self._wait_for_slot(request)
            await self._record(lambda: self._answer(request, slot, admitted))
        finally:
            # The slot is given back even if counting tokens fails.
            try:
                self._used_tokens = self._count_tokens()
            finally:
                self._admission.end(request, self._used_tokens)

    def _prefix(self) -> int | None:
        """Return the hash of what the request shares with others that should go to its replica."""
        inbound = self._inbound
        by_user = self._settings.affinity_by_user and inbound.user_prefix is not None
        return inbound.user_prefix if by_user else inbound.prefix

    async def _wait_for_slot(self, request: QueuedRequest) -> Slot:
        try:
            slot = await self._admission.admit(request)
            while not slot.replica.dialect.serves(self._inbound.route, self._adapter):
                # A replica that has come meanwhile, whose engine lacks the route or the adapter.
                slot = await self._admission.admit_again(request, suspend=False)
        except (ModelGone, Shed) as turned_away:
            self._require_adapter()
            error = self._refusal(turned_away)
            self._turned_away(State.SHED, error)
            raise error from None
        self._waited_s = slot.waited_s
        self._require_adapter()
        return slot

    def _require_adapter(self) -> None:
        """Refuse a request whose adapter was removed while it waited: it has no prices any more."""
        if self._adapter and not self._admission.snapshot.adapter(self._adapter):
            error = self._refusal(errors.ModelNotFound(self._inbound.model))
            self._turned_away(State.REFUSED, error)
            raise error

    async def _record(self, answer: Callable[[], Awaitable[None]]) -> None:
        """Answer a placed request, and record the outcome."""
        try:
            # Reserved only now: queued requests need no room in the journal, and may be very many.
            with self._meter.reserved():
                await answer()
        except JournalFull:
            # No engine has received it, so there is no record yet to write off.
            refusal = unrecordable()
            self._turned_away(State.REFUSED, refusal)
            raise refusal from None
        except Unrecordable:
            refusal = unrecordable()
            self._meter.write_off(reason_of(refusal), refusal.status)
            raise refusal from None
        except (EngineUnreachable, EngineFailed, errors.ApiError, ModelGone, Shed) as failure:
            error = self._refusal(failure)
            if isinstance(error, errors.EngineRejected | errors.EngineBusy):
                # The engine's answer means that it has generated nothing.
                self._presumed_tokens = 0
            await self._meter.settle(State.FAILED, reason_of(error), status=error.status)
            raise error from None
        except asyncio.CancelledError:
            await self._meter.settle(State.INTERRUPTED, CLIENT_GONE, status=CLIENT_GONE_STATUS)
            raise
        except BaseException:
            await self._meter.settle(State.FAILED, INTERNAL_ERROR, status=500)
            raise
        finally:
            self._meter.check_echo(self._reply.echoed)

    async def _answer(self, request: QueuedRequest, slot: Slot, admitted: TierAdmission) -> None:
        """Answer the request, on another replica if the first is lost or fails before an answer.

        Once a stream has begun, its tier is final. Then the other replica must honour it too.
        """
        decision = self._decide(admitted, slot)
        try:
            await self._send(request, slot, decision)
            return
        except (EngineUnreachable, EngineFailed) as failure:
            if self._trace is not None:
                self._trace.failed(failure)
            slot = await self._another_slot(request, failure, decision)
        self._waited_s = slot.waited_s
        if not self._still_holds(decision, slot.replica):
            # The prices of the first decision stay: later increases do not apply to this request.
            decision = replace(self._decide(admitted, slot), rate_card=decision.rate_card)
        await self._send(request, slot, decision)

    async def _answer_without_slot(self, admitted: TierAdmission) -> None:
        """Answer a request for which the engine runs no sequence: at once, whatever its tier."""
        decision = self._decide(admitted, None)
        self._used_tokens = 0
        replicas = self._admission.serving(self._inbound.route, self._adapter)
        first, *others = random.sample(replicas, len(replicas))

        async def answer() -> None:
            try:
                await self._send(None, Slot(first, Tier.DEFAULT, 0.0), decision)
            except (EngineUnreachable, EngineFailed):
                if not others:
                    raise
                await self._send(None, Slot(others[0], Tier.DEFAULT, 0.0), decision)

        await self._record(answer)

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

    def _decide(self, admitted: TierAdmission, slot: Slot | None) -> TierDecision:
        """Decide the tier, in the slot that was received. Without one there is no priority."""
        model = self._admission.snapshot.settings
        raised = slot is not None and slot.raised
        if raised:
            assert self._raised is not None, "only a request with a deadline is raised"
            admitted = self._raised
        decision = decide(
            admitted,
            queued_as=slot.queued_as if slot else Tier.DEFAULT,
            offer=model.tiers.offer,
            native_priority=slot is None or slot.replica.dialect.native_priority,
            route_honoured=slot is not None and slot.replica.honours_priority(self._inbound.route),
            rate_card=model.rate_card_of(self._adapter),
            raised=raised,
        )
        self._insist(decision.reason)
        if self._part is not None:
            self._part.decide(time.monotonic(), priority=decision.served is Tier.PRIORITY)
        return decision

    def _still_holds(self, decision: TierDecision, replica: ReplicaStatus) -> bool:
        """Return whether a decision stays valid on a replica other than the one it was made for."""
        mode = self._admission.snapshot.settings.tiers.priority
        if mode is PriorityMode.OFF:
            # A request keeps a tier that the model no longer offers.
            mode = PriorityMode.AUTO
        honoured = replica.honours_priority(self._inbound.route)
        return decision.served is not Tier.PRIORITY or mode.delivers(honoured=honoured)

    async def _send(
        self, request: QueuedRequest | None, slot: Slot, decision: TierDecision
    ) -> None:
        """Send the request to the engine of its slot, and forward the answer to the client.

        ``request`` is the request in the queue, whose slot is given back early where possible.
        """
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
                    inbound,
                    self._admission.snapshot.id,
                    replica.dialect,
                    decision.served,
                    self._adapter,
                ),
                request_id=self._reply.request_id,
                trace=b"" if self._trace is None else self._trace.send(replica, slot.waited_s),
                read_timeout_s=self._longest_silence_s(place),
                silence=self._silence(place, suspect_if_silent),
                headers=priority_header(inbound.route, replica.dialect, decision.served),
            )
        except EngineUnreachable as lost:
            if lost.silent:
                suspect()
            raise

        def free_slot() -> None:
            if request is not None:
                self._admission.end(request, self._count_tokens())

        forwarding = Forwarding(
            inbound,
            self._reply,
            self._meter,
            slow_reader_s=settings.slow_reader_s,
            free_slot=free_slot,
            suspect=suspect,
        )
        await forwarding.forward(answer, place)

    def _silence(self, place: Placement, suspect: Callable[[], None]) -> Silence | None:
        """Return what watches the engine's pauses; ``None`` if nothing has to."""
        settings = self._settings
        if self._inbound.stream:
            now = asyncio.get_running_loop().time
            return KeepAlive(self._reply, self._meter, place, settings, suspect, now)
        return Suspicion(settings.engine_timeout_s, suspect) if place.may_be_suspended else None

    def _longest_silence_s(self, place: Placement) -> float:
        settings = self._settings
        if not self._inbound.stream:
            # All of it comes at once, however long it was suspended in between.
            suspended_s = settings.suspended_timeout_s if place.may_be_suspended else 0.0
            return settings.engine_timeout_s + suspended_s
        if place.may_be_suspended:
            return max(settings.suspended_timeout_s, settings.stream_timeout_s)
        return settings.stream_timeout_s

    def _count_tokens(self) -> int | None:
        usage = self._meter.usage
        return None if usage is None else usage.limited_tokens

    def _refusal(self, failure: Exception) -> errors.ApiError:
        """Return the error for the client, with the time that the request waited as a header."""
        why_failed = self._admission.snapshot.failure_reason
        error = error_of(failure, self._inbound.model, why_failed)
        if isinstance(failure, Shed):
            self._waited_s = time.monotonic() - failure.request.arrived
        error.headers["x-queue-time-ms"] = milliseconds(self._waited_s)
        return error

    def _turned_away(self, state: State, error: errors.ApiError) -> None:
        self._meter.turn_away(state, reason_of(error), error.status)

    def _origin(self) -> Origin:
        return Origin(
            request_id=self._reply.request_id,
            tenant=self._caller.tenant,
            key_id=self._caller.key_id,
            model=self._adapter or self._admission.snapshot.id,
            route=self._inbound.route.value,
            stream=self._inbound.stream,
            requested=self._inbound.requested_tier,
            arrived=now_utc(),
            ingress=self._ingress,
            parent=self._admission.snapshot.id if self._adapter else "",
        )
