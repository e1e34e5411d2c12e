"""The trace of one request: its ids, and what was sent to which engine when."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from app.contracts.status import ReplicaStatus
from app.core.trace_context import (
    RANDOM,
    SAMPLED,
    TraceContext,
    header_lines,
    parse_trace_context,
    traceparent,
)

# Ids are no secrets, so they need not come from the operating system for each request.
_random: Final = random.Random(secrets.randbits(256))


@dataclass(slots=True)
class Attempt:
    """A request as it was sent to one engine.

    Attributes:
        span_id: what the engine receives as its parent.
        replica: the engine replica.
        queue_s: how long the request had waited for it, in seconds.
        began_ns: when it was sent, in nanoseconds since 1970.
        ended_ns: when it failed; ``None`` if it is the last attempt.
        error: the type of its failure, or empty.
    """

    span_id: str
    replica: ReplicaStatus
    queue_s: float
    began_ns: int
    ended_ns: int | None = None
    error: str = ""


@dataclass(slots=True)
class RequestTrace:
    """The trace of one request.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: the span of the request in this ingress; the parent's if none is recorded.
        parent: the client's context; ``None`` if the trace begins here.
        recorded: whether spans are recorded here.
        began_ns: when the request arrived, in nanoseconds since 1970.
        attempts: what was sent to engines, if spans are recorded.
    """

    trace_id: str
    span_id: str
    parent: TraceContext | None
    recorded: bool
    began_ns: int
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def begin(cls, parent: TraceContext | None, trace_id: str, *, recorded: bool) -> RequestTrace:
        """Return the trace of a request that has just arrived.

        ``trace_id`` is the parent's, if there is one.
        """
        if parent is None or recorded or parent.flags & SAMPLED:
            span_id = new_span_id()
        else:
            # Nobody records it: it is passed on as it came.
            span_id = parent.span_id
        return cls(trace_id, span_id, parent, recorded, time.time_ns())

    def send(self, replica: ReplicaStatus, queue_s: float) -> bytes:
        """Note that the request is sent to an engine; return the header lines that it gets."""
        parent = self.parent
        state, flags = (b"", 0) if parent is None else (parent.state, parent.flags & RANDOM)
        if self.recorded:
            attempt = Attempt(new_span_id(), replica, queue_s, time.time_ns())
            self.attempts.append(attempt)
            sent = traceparent(self.trace_id, attempt.span_id, flags | SAMPLED)
        elif parent is not None and self.span_id == parent.span_id:
            sent = parent.parent
        else:
            sent = traceparent(self.trace_id, self.span_id, flags)
        return header_lines(sent, state)

    def failed(self, error: BaseException) -> None:
        """Note that the engine of the last attempt failed, and that another one may follow."""
        if self.attempts:
            last = self.attempts[-1]
            last.ended_ns, last.error = time.time_ns(), type(error).__name__


def pass_on(headers: Mapping[bytes, bytes]) -> RequestTrace | None:
    """Return the trace of a request where no spans are recorded: the client's, if it has one.

    The engine gets it unchanged, whatever its flags.
    """
    if b"traceparent" not in headers or (parent := parse_trace_context(headers)) is None:
        return None
    return RequestTrace(parent.trace_id, parent.span_id, parent, False, 0)


def new_trace_id() -> str:
    """Return a random trace id; never the invalid one."""
    return f"{_random.randrange(1, 1 << 128):032x}"


def new_span_id() -> str:
    """Return a random span id; never the invalid one."""
    return f"{_random.randrange(1, 1 << 64):016x}"
