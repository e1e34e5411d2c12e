"""One request and its answer: from the client's body to the last byte sent back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app import errors
from app.admission import Admission, ModelGone, Shed
from app.catalog import Catalog
from app.config import IngressSettings
from app.dialect import Route
from app.openai_api import Inbound, parse_request, rewrite_request, stamp, stream_stamper
from app.pricing import TokenUsage
from app.relay import (
    EngineBroke,
    EngineClient,
    EngineFailed,
    EngineUnreachable,
    StreamedAnswer,
    UnaryAnswer,
)
from app.snapshot import ReplicaStatus
from app.sse import Event
from app.ticket import Ticket
from app.tiers import PriorityMode, Tier, TierDecision, admit, decide

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# While an engine starts nobody knows how long it will take: this is how often asking is useful.
_NOT_READY_RETRY_S: Final = 5.0
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies such as nginx hold a stream back without it.
    (b"x-accel-buffering", b"no"),
)


class ClientGone(Exception):
    """The client closed its connection before its request was complete."""


@dataclass(slots=True)
class Services:
    """What every exchange uses; owned by the ``Ingress`` deployment."""

    catalog: Catalog
    engines: EngineClient
    settings: IngressSettings


class Exchange:
    """The ASGI application of one route that an engine answers."""

    def __init__(self, route: Route, services: Services) -> None:
        self._route = route
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        try:
            body = await _read_body(scope, receive, services.settings)
            inbound = parse_request(self._route, body)
            admission = services.catalog.find(inbound.model)
            if admission is None:
                raise errors.ModelNotFound(inbound.model)
            await _serve(services, admission, inbound, Reply(send))
        except errors.ApiError as error:
            await _send_error(send, error)
        except ClientGone:
            return


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is answered, and at which tier."""

    replica: ReplicaStatus
    decision: TierDecision
    queue_s: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what every answer says about itself."""
        stamps = [
            (b"x-service-tier", self.decision.served.value.encode()),
            (b"x-engine", self.replica.dialect.engine.encode()),
            (b"x-queue-time-ms", _milliseconds(self.queue_s).encode()),
        ]
        if self.decision.reason is not None:
            stamps.append((b"x-service-tier-reason", self.decision.reason.value.encode()))
        return stamps


class Reply:
    """What goes back to the client.

    ``request_id`` is this request's own, which no other has. ``x-request-id`` is not it: Serve
    adds that header itself, with the client's value if it sent one, and clients repeat values.
    """

    def __init__(self, send: Send) -> None:
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.usage: TokenUsage | None = None
        self._send = send

    async def start(self, headers: tuple[tuple[bytes, bytes], ...], place: Place) -> None:
        headers = (*headers, *place.headers())
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, piece: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})


async def _serve(services: Services, admission: Admission, inbound: Inbound, reply: Reply) -> None:
    """Wait for a place, and for one more if the engine is lost or fails before it answers."""
    snapshot, settings = admission.snapshot, services.settings
    if not snapshot.replicas:
        raise _unavailable(inbound.model)
    wanted = inbound.requested_tier or settings.default_tier
    ticket = Ticket(
        tier=admit(wanted, snapshot.settings.tiers.offer)[0],
        # Without keys all clients are one.
        tenant="",
        tokens=inbound.expected_tokens,
        route=inbound.route,
        prefix=inbound.prefix,
        fail_fast=inbound.fail_fast,
    )
    try:
        await _pass_or_replay(services, admission, inbound, ticket, reply)
    except ModelGone:
        raise errors.ModelNotFound(inbound.model) from None
    except Shed as shed:
        raise _overloaded(shed.ticket) from None
    except EngineUnreachable:
        raise _unavailable(inbound.model) from None
    except EngineFailed as failed:
        raise _after_waiting(failed.error, ticket) from None
    except errors.ApiError as error:
        raise _after_waiting(error, ticket) from None
    finally:
        usage = reply.usage
        admission.end(ticket, usage.prompt_tokens + usage.completion_tokens if usage else None)


async def _pass_or_replay(
    services: Services, admission: Admission, inbound: Inbound, ticket: Ticket, reply: Reply
) -> None:
    replica = await admission.admit(ticket)
    decision = _decide(services, admission, inbound, ticket, replica)
    try:
        await _pass(services, admission, inbound, _place(ticket, replica, decision), reply)
        return
    except EngineUnreachable:
        replica = await admission.admit_again(ticket)
    except EngineFailed:
        # It may be the request that it cannot bear. So the replica goes on getting others, and
        # where there is no other replica the failure is the answer.
        if not admission.has_another(ticket):
            raise
        replica = await admission.admit_again(ticket, suspend=False)
    if not _still_holds(decision, admission, inbound.route, replica):
        decision = _decide(services, admission, inbound, ticket, replica)
    await _pass(services, admission, inbound, _place(ticket, replica, decision), reply)


def _place(ticket: Ticket, replica: ReplicaStatus, decision: TierDecision) -> Place:
    return Place(replica, decision, ticket.placed - ticket.arrived)


def _decide(
    services: Services,
    admission: Admission,
    inbound: Inbound,
    ticket: Ticket,
    replica: ReplicaStatus,
) -> TierDecision:
    model = admission.snapshot.settings
    return decide(
        requested=inbound.requested_tier,
        default_tier=services.settings.default_tier,
        stood_as=ticket.tier,
        offer=model.tiers.offer,
        native_priority=replica.dialect.native_priority,
        route_honoured=replica.honours_priority(inbound.route),
        rate_card=model.rate_card,
    )


def _still_holds(
    decision: TierDecision, admission: Admission, route: Route, replica: ReplicaStatus
) -> bool:
    """Whether a decision can stand on another replica than the one it was made for."""
    in_line = admission.snapshot.settings.tiers.priority is PriorityMode.LINE
    return decision.served is not Tier.PRIORITY or in_line or replica.honours_priority(route)


def _unavailable(model: str) -> errors.Unavailable:
    return errors.Unavailable(
        f"No engine of the model `{model}` is ready. Try again in a few seconds.",
        "engine_not_ready",
        _NOT_READY_RETRY_S,
    )


def _after_waiting(error: errors.ApiError, ticket: Ticket) -> errors.ApiError:
    error.headers["x-queue-time-ms"] = _milliseconds(ticket.placed - ticket.arrived)
    return error


def _overloaded(ticket: Ticket) -> errors.Overloaded:
    error = errors.Overloaded(ticket.retry_after_s)
    error.headers["x-queue-time-ms"] = _milliseconds(time.monotonic() - ticket.arrived)
    if ticket.shed is not None:
        error.headers["x-shed-reason"] = ticket.shed.value
    return error


def _milliseconds(seconds: float) -> str:
    return f"{max(seconds, 0.0) * 1000:.1f}"


async def _pass(
    services: Services, admission: Admission, inbound: Inbound, place: Place, reply: Reply
) -> None:
    dialect, served = place.replica.dialect, place.decision.served
    async with services.engines.send(
        place.replica,
        inbound.route,
        rewrite_request(inbound, admission.snapshot.id, dialect, served),
        request_id=reply.request_id,
        read_timeout_s=services.settings.engine_timeout_s,
    ) as answer:
        if isinstance(answer, UnaryAnswer):
            await _forward_unary(answer, place, reply)
        else:
            await _forward_stream(answer, inbound, place, reply)


async def _forward_unary(answer: UnaryAnswer, place: Place, reply: Reply) -> None:
    try:
        fields = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise errors.ServerError from None
    reply.usage = stamp(fields, place.decision)
    body = orjson.dumps(fields)
    length = (b"content-length", str(len(body)).encode())
    await reply.start((_JSON, length), place)
    await reply.write(body, more=False)


async def _forward_stream(
    answer: StreamedAnswer, inbound: Inbound, place: Place, reply: Reply
) -> None:
    stamper = stream_stamper(inbound, place.decision)
    await reply.start(_SSE, place)
    try:
        async for events in answer:
            await reply.write(_stamped(stamper.feed, events))
        broken = not stamper.ended
    except (EngineBroke, orjson.JSONDecodeError):
        broken = not stamper.ended
    finally:
        reply.usage = stamper.usage
    last = b"".join(stamper.break_off()) if broken else b""
    await reply.write(last, more=False)


def _stamped(feed: Callable[[Event], Any], events: list[Event]) -> bytes:
    return b"".join(piece for event in events for piece in feed(event))


async def _read_body(scope: Scope, receive: Receive, settings: IngressSettings) -> bytes:
    limit = settings.max_body_bytes
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise errors.BodyTooLarge(limit)
    pieces, length = [], 0
    while True:
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                message = await receive()
        except TimeoutError:
            raise errors.RequestTimeout from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        length += len(pieces[-1])
        if length > limit:
            raise errors.BodyTooLarge(limit)
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _send_error(send: Send, error: errors.ApiError) -> None:
    body = error.body()
    # Until it stands in line a request has not waited.
    headers = {"x-queue-time-ms": _milliseconds(0)} | error.headers
    fields = [
        _JSON,
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": False})
