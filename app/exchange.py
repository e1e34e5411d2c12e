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
from app.catalog import Catalog
from app.config import IngressSettings
from app.dialect import Route
from app.openai_api import Inbound, parse_request, rewrite_request, stamp, stream_stamper
from app.placement import Placer
from app.relay import EngineBroke, EngineClient, EngineUnreachable, StreamedAnswer, UnaryAnswer
from app.snapshot import ReplicaStatus
from app.sse import Event
from app.tiers import PriorityMode, Tier, TierDecision, admit, decide

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_ATTEMPTS: Final = 2
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
            placer = services.catalog.find(inbound.model)
            if placer is None:
                raise errors.ModelNotFound(inbound.model)
            await _serve(services, placer, inbound, Reply(send))
        except errors.ApiError as error:
            await _send_error(send, error)
        except ClientGone:
            return


class Reply:
    """What goes back to the client.

    ``request_id`` is this request's own, which no other has. ``x-request-id`` is not it: Serve
    adds that header itself, with the client's value if it sent one, and clients repeat values.
    """

    def __init__(self, send: Send) -> None:
        self.request_id = f"req_{uuid.uuid4().hex}"
        self._send = send

    async def start(
        self,
        headers: tuple[tuple[bytes, bytes], ...],
        decision: TierDecision,
        replica: ReplicaStatus,
    ) -> None:
        stamps = [
            (b"x-service-tier", decision.served.value.encode()),
            (b"x-engine", replica.dialect.engine.encode()),
        ]
        if decision.reason is not None:
            stamps.append((b"x-service-tier-reason", decision.reason.value.encode()))
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": [*headers, *stamps]}
        )

    async def write(self, piece: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})


async def _serve(services: Services, placer: Placer, inbound: Inbound, reply: Reply) -> None:
    """Place the request, and once more elsewhere if the engine is lost before it answers."""
    settings = services.settings
    tier, _ = admit(
        inbound.requested_tier or settings.default_tier, placer.snapshot.settings.tiers.offer
    )
    decision: TierDecision | None = None
    tried: frozenset[str] = frozenset()
    for _attempt in range(_ATTEMPTS):
        now = time.monotonic()
        replica = placer.choose(inbound.route, tier, now, without=tried)
        if replica is None:
            break
        if decision is None or not _still_holds(decision, placer, inbound.route, replica):
            decision = _decide(placer, inbound, settings.default_tier, replica)
        try:
            await _pass(services, placer, replica, inbound, decision, reply)
            return
        except EngineUnreachable:
            placer.report_lost(replica, time.monotonic())
            tried |= {replica.replica_id}
    raise _unavailable(inbound.model)


def _decide(
    placer: Placer, inbound: Inbound, default_tier: Tier, replica: ReplicaStatus
) -> TierDecision:
    settings = placer.snapshot.settings
    return decide(
        requested=inbound.requested_tier,
        default_tier=default_tier,
        offer=settings.tiers.offer,
        native_priority=replica.dialect.native_priority,
        route_honoured=replica.honours_priority(inbound.route),
        rate_card=settings.rate_card,
    )


def _still_holds(
    decision: TierDecision, placer: Placer, route: Route, replica: ReplicaStatus
) -> bool:
    """Whether a decision can stand on another replica than the one it was made for."""
    in_line = placer.snapshot.settings.tiers.priority is PriorityMode.LINE
    return decision.served is not Tier.PRIORITY or in_line or replica.honours_priority(route)


def _unavailable(model: str) -> errors.Unavailable:
    return errors.Unavailable(
        f"No engine of the model `{model}` is ready. Try again in a few seconds.",
        "engine_not_ready",
        _NOT_READY_RETRY_S,
    )


async def _pass(
    services: Services,
    placer: Placer,
    replica: ReplicaStatus,
    inbound: Inbound,
    decision: TierDecision,
    reply: Reply,
) -> None:
    body = rewrite_request(inbound, placer.snapshot.id, replica.dialect, decision.served)
    with placer.place(replica):
        async with services.engines.send(
            replica,
            inbound.route,
            body,
            request_id=reply.request_id,
            read_timeout_s=services.settings.engine_timeout_s,
        ) as answer:
            if isinstance(answer, UnaryAnswer):
                await _forward_unary(answer, replica, decision, reply)
            else:
                await _forward_stream(answer, replica, inbound, decision, reply)


async def _forward_unary(
    answer: UnaryAnswer, replica: ReplicaStatus, decision: TierDecision, reply: Reply
) -> None:
    try:
        fields = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise errors.ServerError from None
    stamp(fields, decision)
    body = orjson.dumps(fields)
    length = (b"content-length", str(len(body)).encode())
    await reply.start((_JSON, length), decision, replica)
    await reply.write(body, more=False)


async def _forward_stream(
    answer: StreamedAnswer,
    replica: ReplicaStatus,
    inbound: Inbound,
    decision: TierDecision,
    reply: Reply,
) -> None:
    stamper = stream_stamper(inbound, decision)
    await reply.start(_SSE, decision, replica)
    try:
        async for events in answer:
            await reply.write(_stamped(stamper.feed, events))
        broken = not stamper.ended
    except (EngineBroke, orjson.JSONDecodeError):
        broken = not stamper.ended
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
    headers = [
        _JSON,
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
