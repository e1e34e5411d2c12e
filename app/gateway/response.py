"""Sends answers and errors to a client, with the headers that every answer carries."""

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
from app.observe.observers import CLIENT_GONE_STATUS

_TIERS: Final = {tier: tier.value.encode() for tier in Tier}

# Ids are no secrets, so they need not come from the operating system. That would cost a system
# call for each, and would release the interpreter to other threads.
_random: Final = random.Random(secrets.randbits(256))

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON: Final = (b"content-type", b"application/json")
TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")
SSE: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Without it, proxies such as nginx buffer a stream.
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True)
class Placement:
    """The replica and the tier of a request, and how long it was queued, in seconds."""

    replica: ReplicaStatus
    decision: TierDecision
    queue_s: float

    @property
    def may_be_suspended(self) -> bool:
        """Whether the engine may stop generating for it, for a request of a better tier."""
        return self.replica.dialect.preempts and self.decision.served is not Tier.PRIORITY

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer from this placement."""
        stamps = [
            (b"x-service-tier", _TIERS[self.decision.served]),
            (b"x-engine", self.replica.dialect.engine.encode()),
            (b"x-queue-time-ms", milliseconds(self.queue_s).encode()),
        ]
        if (why := self.decision.why) is not None:
            stamps.append((b"x-service-tier-reason", why.encode()))
        return stamps


class Reply:
    """The answer to one client.

    Attributes:
        request_id: the unique id of this request. It differs from ``x-request-id``: Serve adds that
            header itself, with the client's value if there is one, and clients reuse values.
        headers: headers that are added to any answer or error.
        started: whether an answer has begun.
        ended: whether the last byte of an answer has been sent.
        echoed: the tier in the headers of the answer; ``None`` before it has begun.
    """

    def __init__(self, send: Send) -> None:
        self.request_id = new_request_id()
        self.headers: list[tuple[str, str]] = []
        self.started = self.ended = False
        self.echoed: Tier | None = None
        self._send = send

    async def start(self, headers: tuple[tuple[bytes, bytes], ...], place: Placement) -> None:
        """Send status 200 and the headers."""
        fields = [*headers, *place.headers()]
        if self.headers:
            fields += [(name.encode(), value.encode()) for name, value in self.headers]
        self.started, self.echoed = True, place.decision.served
        await self._send({"type": "http.response.start", "status": 200, "headers": fields})

    def write(self, piece: bytes, *, more: bool = True) -> Awaitable[None]:
        """Send a part of the body; to be awaited at once."""
        # No coroutine of its own, because this runs for every event.
        if not more:
            self.ended = True
        return self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def refuse(self, error: errors.ApiError, body: bytes | None = None) -> None:
        """Send an error instead of an answer; ``body`` is its JSON, else in OpenAI's shape."""
        body = error.body() if body is None else body
        # A request that was refused before it was queued has not waited.
        headers = {"x-queue-time-ms": milliseconds(0)} | dict(self.headers) | error.headers
        fields = [
            JSON,
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]
        self.started = True
        await self._send({"type": "http.response.start", "status": error.status, "headers": fields})
        await self.write(body, more=False)

    async def gone(self) -> None:
        """Tell Serve's metrics and its log the status of a request whose client has gone."""
        self.started = True
        await self._send(
            {"type": "http.response.start", "status": CLIENT_GONE_STATUS, "headers": []}
        )


def new_request_id() -> str:
    """Return a globally unique request id.

    As in a UUID of version 7 (RFC 9562), the time in milliseconds comes first, so that new records
    go to the end of the database's index. At 200,000 records SQLite takes almost twice as long for
    random ids, and the cost grows with each record.
    """
    return f"req_{time.time_ns() // 1_000_000:012x}{_random.getrandbits(80):020x}"


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds, as headers show it."""
    return f"{max(seconds, 0.0) * 1000:.1f}"
