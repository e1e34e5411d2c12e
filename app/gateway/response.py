"""What goes back to a client, and what every answer says about itself."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from app.contracts.status import ReplicaStatus
from app.core import errors
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier

_TIERS: Final = {tier: tier.value.encode() for tier in Tier}

# An id is no secret, so it need not come from the operating system, which would cost a system call
# for each, and the interpreter to whichever thread waits for it.
_random: Final = random.Random(secrets.randbits(256))

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON: Final = (b"content-type", b"application/json")
SSE: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies such as nginx hold a stream back without it.
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request is answered, and at which tier."""

    replica: ReplicaStatus
    decision: TierDecision
    queue_s: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what every answer says about itself."""
        stamps = [
            (b"x-service-tier", _TIERS[self.decision.served]),
            (b"x-engine", self.replica.dialect.engine.encode()),
            (b"x-queue-time-ms", milliseconds(self.queue_s).encode()),
        ]
        if self.decision.reason is not None:
            stamps.append((b"x-service-tier-reason", self.decision.reason.value.encode()))
        return stamps


class Reply:
    """An answer on its way to the client.

    ``request_id`` is this request's own, which no other has. ``x-request-id`` is not it: Serve
    adds that header itself, with the client's value if it sent one, and clients repeat values.
    ``headers`` are sent with whatever answer there is. ``started`` says whether one has begun.
    """

    def __init__(self, send: Send) -> None:
        self.request_id = new_request_id()
        self.headers: list[tuple[str, str]] = []
        self.started = False
        self._send = send

    async def start(self, headers: tuple[tuple[bytes, bytes], ...], place: Placement) -> None:
        """Send status 200 and the headers."""
        fields = [*headers, *place.headers()]
        if self.headers:
            fields += [(name.encode(), value.encode()) for name, value in self.headers]
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": fields})

    async def write(self, piece: bytes, *, more: bool = True) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def refuse(self, error: errors.ApiError) -> None:
        """Send an error instead of an answer."""
        body = error.body()
        # Until it stands in the queue a request has not waited.
        headers = {"x-queue-time-ms": milliseconds(0)} | dict(self.headers) | error.headers
        fields = [
            JSON,
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]
        self.started = True
        await self._send({"type": "http.response.start", "status": error.status, "headers": fields})
        await self.write(body, more=False)


def new_request_id() -> str:
    """Return an id that no request ever had or will have.

    As in a UUID of version 7 (RFC 9562) the time comes first, in milliseconds, so that records come
    at the end of the database's index. At 200,000 records SQLite takes almost twice as long for
    random ones, and more with each that comes.
    """
    return f"req_{time.time_ns() // 1_000_000:012x}{_random.getrandbits(80):020x}"


def milliseconds(seconds: float) -> str:
    """Return a time as headers tell it."""
    return f"{max(seconds, 0.0) * 1000:.1f}"
