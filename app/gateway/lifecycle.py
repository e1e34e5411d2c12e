"""The way of one request: into the queue, to an engine and back, and onto the bill."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Final

from app import alarms
from app.contracts.status import Availability, ReplicaStatus
from app.core import errors
from app.core.shed_reason import ShedReason
from app.core.tier_decision import ALL_RIGHTS, TierDecision, admit, decide
from app.core.tiers import PriorityMode, Tier
from app.flow.admission import Admission, ModelGone, Shed
from app.flow.request import QueuedRequest, RequestState
from app.gateway.metering import Meter
from app.gateway.response import JSON, SSE, Placement, Reply, milliseconds
from app.gateway.services import Services
from app.ledger.ledger import JournalFull, Unrecordable
from app.ledger.record import Origin, State, now_utc
from app.protocol.requests import Inbound, rewrite_request
from app.protocol.stream import StreamStamper, stamp_answer, stream_stamper
from app.tenants.access import Caller
from app.tenants.priority_share import SharePart
from app.upstream.client import (
    EngineBroke,
    EngineFailed,
    EngineUnreachable,
    StreamedAnswer,
    UnaryAnswer,
)

# While an engine starts, or the store is away, nobody knows how long it will take: this is how
# often asking is useful.
_TRY_AGAIN_S: Final = 5.0
# Somebody has to bring a machine.
_NO_NODE_S: Final = 60.0
_NOT_READY: Final = "engine_not_ready"


class Lifecycle:
    """One request to one model, from the queue to the last byte of its answer.

    Whatever happens on the way, its slot is given back, and once it has been placed on an engine
    replica it has exactly one settled record.
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
        # Those in force now hold for the whole request.
        self._settings = services.settings
        assert services.ledger is not None, "settings come before requests"
        self._ledger = services.ledger
        self._meter = Meter(self._ledger, self._origin())
        self._default_tier = caller.default_tier or self._settings.default_tier
        self._rights = ALL_RIGHTS
        self._part: SharePart | None = None
        # What counts against the key's limit where no usage becomes known.
        self._presumed_tokens = 0
        # Whether a piece of a stream waits for the client.
        self._writing = False
        self._request = QueuedRequest(
            tier=Tier.DEFAULT,
            tenant=caller.tenant,
            tokens=inbound.expected_tokens,
            route=inbound.route,
            prefix=inbound.prefix,
            fail_fast=inbound.fail_fast,
        )

    async def run(self) -> None:
        """Answer the request.

        Raises:
            ApiError: it is not answered; nothing has been sent yet.
        """
        with self._flight():
            await self._run()

    def _flight(self) -> AbstractContextManager[None]:
        """Count the request as in flight for its key and tenant."""
        if self._access is None:
            return nullcontext()
        try:
            return self._access.flight(self._caller, self._settings.in_flight)
        except errors.TooManyInFlight as error:
            self._meter.turn_away(State.REFUSED, _reason(error))
            raise

    async def _run(self) -> None:
        model = self._admission.snapshot
        if model.state is Availability.NOT_OFFERED:
            self._meter.turn_away(State.REFUSED, Availability.NOT_OFFERED.value)
            raise self._not_offered()
        if not model.replicas and model.sleep is None:
            self._meter.turn_away(State.REFUSED, _NOT_READY)
            raise self._unavailable()
        charged = time.monotonic()
        await self._charge()
        try:
            replica = await self._admission.admit(self._request)
            await self._serve(replica)
        except (ModelGone, Shed) as turned_away:
            error = self._error_of(turned_away)
            self._meter.turn_away(State.SHED, _reason(error))
            raise error from None
        finally:
            self._end(charged)

    def _end(self, charged: float) -> None:
        """Give back what the request has held, each thing whatever becomes of the others."""
        with ExitStack() as ending:
            tokens = None
            if self._access is not None:
                age_s = time.monotonic() - charged
                ending.callback(lambda: self._put_right(tokens, age_s))
            if self._part is not None:
                ending.callback(self._part.end)
            ending.callback(lambda: self._free_slot(tokens))
            tokens = self._used_tokens()

    def _put_right(self, tokens: int | None, age_s: float) -> None:
        assert self._access is not None
        used = self._presumed_tokens if tokens is None else tokens
        self._access.put_right(self._caller, self._request.tokens, used, age_s)

    def _used_tokens(self) -> int | None:
        usage = self._meter.usage
        return None if usage is None else usage.prompt_tokens + usage.completion_tokens

    def _free_slot(self, tokens: int | None) -> None:
        """Give the slot back, once; ``tokens`` were used, if anybody knows."""
        if self._request.state is not RequestState.ENDED:
            self._admission.end(self._request, tokens)

    def _engine_ended(self) -> None:
        """Give the slot back where the client does not read, so that the last events have to wait.

        A client that keeps up gets them at once, and then the usage is known.
        """
        if self._writing:
            self._free_slot(self._used_tokens())

    async def _charge(self) -> None:
        """Take the request from its key's limits, and find out at which tier it may stand."""
        wanted = self._inbound.requested_tier or self._default_tier
        if self._access is not None:
            try:
                await self._access.charge(self._caller, self._request.tokens)
            except errors.RateLimited as error:
                self._meter.turn_away(State.REFUSED, _reason(error))
                raise
            self._reply.headers = self._access.headers(self._caller)
            self._rights, self._part = self._access.rights(self._caller, wanted)
        offer = self._admission.snapshot.settings.tiers.offer
        self._request.tier = admit(wanted, offer, self._rights)[0]

    async def _serve(self, replica: ReplicaStatus) -> None:
        """Have a placed request answered, and write down what has become of it."""
        try:
            # Only now: those who wait need no room in the journal, and may be very many.
            with self._ledger.reserved():
                await self._answer(replica)
        except JournalFull:
            # No engine has seen it, so there is no record yet that could be written off.
            refusal = _unrecordable()
            self._meter.turn_away(State.REFUSED, _reason(refusal))
            raise refusal from None
        except Unrecordable:
            refusal = _unrecordable()
            self._meter.write_off(_reason(refusal))
            raise refusal from None
        except (EngineUnreachable, EngineFailed, errors.ApiError, ModelGone, Shed) as failure:
            error = self._error_of(failure)
            if isinstance(error, errors.EngineRejected | errors.EngineBusy):
                # The engine says that it has generated nothing.
                self._presumed_tokens = 0
            await self._meter.settle(State.FAILED, _reason(error))
            raise error from None
        except asyncio.CancelledError:
            await self._meter.settle(State.INTERRUPTED, "client_gone")
            raise
        except BaseException:
            await self._meter.settle(State.FAILED, "internal_error")
            raise

    async def _answer(self, replica: ReplicaStatus) -> None:
        """Have it answered, by another replica if the first is lost or fails beforehand."""
        decision = self._decide(replica)
        try:
            await self._pass(replica, decision)
            return
        except EngineUnreachable as lost:
            # A replica that goes on serving others goes on getting them.
            suspend = lost.silent or not lost.timed_out
            replica = await self._admission.admit_again(self._request, suspend=suspend)
        except EngineFailed as failed:
            # It may be the request that it cannot bear. So the replica goes on getting others,
            # and where there is no other replica the failure is the answer.
            replica = await self._replica_after(failed)
        if not self._still_holds(decision, replica):
            # At the prices that it was decided for: what has become dearer since is not for it.
            decision = replace(self._decide(replica), rate_card=decision.rate_card)
        await self._pass(replica, decision)

    async def _replica_after(self, failed: EngineFailed) -> ReplicaStatus:
        """Wait for a place on a replica other than the one that failed the request.

        Raises:
            EngineFailed: there is no other, or no longer.
            Shed, ModelGone: as ``Admission.admit``.
        """
        if not self._admission.has_another(self._request):
            raise failed
        try:
            return await self._admission.admit_again(self._request, suspend=False)
        except Shed as shed:
            if shed.request.shed is ShedReason.NO_OTHER_REPLICA:
                raise failed from None
            raise

    def _decide(self, replica: ReplicaStatus) -> TierDecision:
        model = self._admission.snapshot.settings
        decision = decide(
            requested=self._inbound.requested_tier,
            default_tier=self._default_tier,
            stood_as=self._request.tier,
            offer=model.tiers.offer,
            native_priority=replica.dialect.native_priority,
            route_honoured=replica.honours_priority(self._inbound.route),
            rate_card=model.rate_card,
            rights=self._rights,
        )
        if self._part is not None:
            self._part.decide(time.monotonic(), priority=decision.served is Tier.PRIORITY)
        return decision

    def _still_holds(self, decision: TierDecision, replica: ReplicaStatus) -> bool:
        """Whether a decision can stand on another replica than the one it was made for."""
        in_queue = self._admission.snapshot.settings.tiers.priority is PriorityMode.QUEUE
        honoured = replica.honours_priority(self._inbound.route)
        return decision.served is not Tier.PRIORITY or in_queue or honoured

    async def _pass(self, replica: ReplicaStatus, decision: TierDecision) -> None:
        inbound, dialect = self._inbound, replica.dialect
        place = Placement(replica, decision, self._request.placed - self._request.arrived)
        self._meter.place(place)
        self._presumed_tokens = self._request.tokens
        if inbound.stream:
            self._meter.open()
        settings = self._settings
        try:
            answer = await self._engines.send(
                replica,
                inbound.route,
                rewrite_request(inbound, self._admission.snapshot.id, dialect, decision.served),
                request_id=self._reply.request_id,
                read_timeout_s=(
                    settings.stream_timeout_s if inbound.stream else settings.engine_timeout_s
                ),
            )
        except EngineUnreachable as lost:
            if lost.silent:
                self._admission.suspect(replica.replica_id, inbound.route)
            raise
        if isinstance(answer, UnaryAnswer):
            await self._forward_unary(answer, place)
        else:
            with answer:
                await self._forward_unless_slow(answer, place)

    async def _forward_unary(self, answer: UnaryAnswer, place: Placement) -> None:
        body, count = stamp_answer(answer.body, self._inbound, place.decision)
        self._meter.counted = count.result()
        self._note_odd_usage(place, odd=count.odd)
        self._meter.first_byte()
        await self._meter.settle(State.COMPLETED)
        # The engine has ended: its slot does not wait for a client that reads slowly.
        self._free_slot(self._used_tokens())
        length = (b"content-length", str(len(body)).encode())
        await self._reply.start((JSON, length), place)
        await self._reply.write(body, more=False)

    async def _forward_unless_slow(self, answer: StreamedAnswer, place: Placement) -> None:
        """Forward a stream, or break it off where its client does not read.

        The client gets no error event: it would only wait behind what is not read.
        """
        stamper = stream_stamper(self._inbound, place.decision)
        try:
            async with asyncio.timeout(None) as patience:
                now = asyncio.get_running_loop().time
                answer.watch(
                    self._settings.slow_reader_s,
                    lambda: patience.reschedule(now()),
                    self._engine_ended,
                )
                await self._forward_stream(answer, place, stamper)
        except TimeoutError:
            if not patience.expired():
                raise
            # What was generated for it is billed, read or not.
            stamper.feed(answer.waiting_events())
            await self._meter.settle(State.INTERRUPTED, "client_slow")

    async def _forward_stream(
        self, answer: StreamedAnswer, place: Placement, stamper: StreamStamper
    ) -> None:
        meter, reply = self._meter, self._reply
        await meter.opened(stamper)
        await reply.start(SSE, place)
        over, last = False, b""
        try:
            while blocks := await answer.next_events():
                if over:
                    # Read to the end all the same: the connection is then good for another.
                    continue
                piece = stamper.feed(blocks)
                meter.progress(len(blocks))
                if stamper.broken:
                    last = piece
                    break
                if stamper.failed:
                    await meter.settle(State.INTERRUPTED, "engine_error")
                elif stamper.ended:
                    await meter.settle(State.COMPLETED)
                over = stamper.ended
                if answer.complete:
                    # Its slot does not wait for the client to read the rest.
                    self._free_slot(self._used_tokens())
                self._writing = True
                await reply.write(piece, more=not over)
                self._writing = False
        except EngineBroke as lost:
            if lost.silent:
                self._admission.suspect(place.replica.replica_id, self._inbound.route)
        finally:
            self._note_odd_usage(place, odd=stamper.odd_usage)
        if not over:
            last += stamper.break_off()
            await meter.settle(State.INTERRUPTED, "engine_lost")
            await reply.write(last, more=False)

    def _note_odd_usage(self, place: Placement, *, odd: bool) -> None:
        if odd:
            replica = place.replica.replica_id
            alarms.PROCESS.raised("odd usage", f"{replica} told none that can be: it is estimated")

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

    def _error_of(self, failure: Exception) -> errors.ApiError:
        """Return what the client gets where its request was not answered."""
        request, model = self._request, self._inbound.model
        waited_s = request.placed - request.arrived
        match failure:
            case Shed():
                waited_s = time.monotonic() - request.arrived
                error: errors.ApiError = errors.Overloaded(request.retry_after_s)
                if request.shed is ShedReason.NOT_OFFERED:
                    error = self._not_offered()
                elif request.shed is ShedReason.NO_OTHER_REPLICA:
                    error = self._unavailable()
                if request.shed is not None:
                    error.headers["x-shed-reason"] = request.shed.value
            case ModelGone():
                error = errors.ModelNotFound(model)
            case EngineFailed():
                error = failure.error
            case errors.ApiError():
                error = failure
            case _:
                error = self._unavailable()
        error.headers["x-queue-time-ms"] = milliseconds(waited_s)
        return error

    def _not_offered(self) -> errors.Unavailable:
        return errors.Unavailable(
            f"No machine here can run the model `{self._inbound.model}` at the moment.",
            Availability.NOT_OFFERED.value,
            _NO_NODE_S,
        )

    def _unavailable(self) -> errors.Unavailable:
        return errors.Unavailable(
            f"No engine of the model `{self._inbound.model}` is ready. Try again in a few seconds.",
            _NOT_READY,
            _TRY_AGAIN_S,
        )


def _reason(error: errors.ApiError) -> str:
    """Return why a request was not answered, as its record tells it."""
    if isinstance(error, errors.EngineRejected):
        # Its code is the engine's own, of whatever length.
        return "engine_rejected"
    return error.headers.get("x-shed-reason") or error.code or error.type


def _unrecordable() -> errors.Unavailable:
    return errors.Unavailable(
        "Usage cannot be recorded at the moment, so the request was not served. Try again in a "
        "few seconds.",
        "ledger_unavailable",
        _TRY_AGAIN_S,
    )
