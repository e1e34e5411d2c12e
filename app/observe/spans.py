"""The spans of a request that has ended, as plain values. Names follow OpenTelemetry's conventions.

POST /v1/chat/completions     SERVER    the whole request
  queue                       INTERNAL  one for each time that it was queued
  chat MODEL                  CLIENT    one for each engine that it was sent to
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final
from urllib.parse import urlsplit

from app.core.tier_decision import without_raise
from app.ledger.record import State, UsageRecord
from app.observe.observers import CLIENT_GONE, Ended, Refused
from app.observe.operations import PROVIDER, operation_of
from app.observe.request_trace import Attempt, RequestTrace, new_span_id

Attributes = dict[str, str | int | float | bool]

_CLIENTS_OWN: Final = frozenset({CLIENT_GONE, "client_slow"})
"""Reasons of answers that were cut off by their clients."""
_NS: Final = 1_000_000_000


class Kind(Enum):
    """OpenTelemetry's kinds of spans, as far as they are used."""

    SERVER = "server"
    INTERNAL = "internal"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Span:
    """One span.

    Attributes:
        name: as shown in a trace.
        kind: its kind.
        span_id: 16 hexadecimal digits.
        parent_id: the span that it is part of; empty for the first of a trace.
        began_ns: in nanoseconds since 1970.
        ended_ns: in nanoseconds since 1970; not before ``began_ns``.
        attributes: by name.
        failed: whether it is an error of the server or the engine.
    """

    name: str
    kind: Kind
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: Attributes = field(default_factory=dict)
    failed: bool = False


def spans_of(request: Ended | Refused, trace: RequestTrace, ended_ns: int) -> list[Span]:
    """Return the spans of a request: that of the ingress first.

    Args:
        request: the request.
        trace: its trace.
        ended_ns: when it ended, in nanoseconds since 1970.
    """
    ended_ns = max(ended_ns, trace.began_ns)
    server = Span(
        f"POST /v1/{_route(request)}",
        Kind.SERVER,
        trace.span_id,
        "" if trace.parent is None else trace.parent.span_id,
        trace.began_ns,
        ended_ns,
        _of_request(request),
        failed=request.status >= 500,
    )
    if isinstance(request, Refused):
        return [server]
    return [server, *_inner(request.record, trace, ended_ns)]


def _inner(record: UsageRecord, trace: RequestTrace, ended_ns: int) -> Iterator[Span]:
    free_ns = trace.began_ns
    for attempt in trace.attempts:
        queued_ns = max(free_ns, attempt.began_ns - int(attempt.queue_s * _NS))
        yield _queue(trace, queued_ns, attempt.began_ns)
        yield _call(record, trace, attempt, ended_ns)
        free_ns = attempt.began_ns if attempt.ended_ns is None else attempt.ended_ns
    if not trace.attempts and record.queue_s and not record.state.served:
        yield _queue(trace, ended_ns - int(record.queue_s * _NS), ended_ns)


def _queue(trace: RequestTrace, began_ns: int, ended_ns: int) -> Span:
    began_ns = min(max(began_ns, trace.began_ns), ended_ns)
    return Span("queue", Kind.INTERNAL, new_span_id(), trace.span_id, began_ns, ended_ns)


def _call(record: UsageRecord, trace: RequestTrace, attempt: Attempt, ended_ns: int) -> Span:
    """Return the span of a request to one engine. Only the last attempt ends with the request."""
    operation, model = operation_of(record.origin.route), record.origin.model
    url = urlsplit(attempt.replica.base_url)
    error = attempt.error
    if attempt.ended_ns is None and record.state is not State.COMPLETED:
        error = without_raise(record.reason) or record.state.value
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "server.address": url.hostname or "",
        "server.port": url.port or 80,
        "frontline.engine": attempt.replica.dialect.engine,
        "frontline.pool": attempt.replica.pool,
        "frontline.replica": attempt.replica.replica_id,
    }
    if error:
        attributes["error.type"] = error
    return Span(
        f"{operation} {model}",
        Kind.CLIENT,
        attempt.span_id,
        trace.span_id,
        attempt.began_ns,
        max(attempt.ended_ns or ended_ns, attempt.began_ns),
        attributes,
        failed=bool(error) and error not in _CLIENTS_OWN,
    )


def _route(request: Ended | Refused) -> str:
    return request.route if isinstance(request, Refused) else request.record.origin.route


def _of_request(request: Ended | Refused) -> Attributes:
    path = f"/v1/{_route(request)}"
    attributes: Attributes = {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": request.status,
        "gen_ai.operation.name": operation_of(_route(request)),
        "gen_ai.provider.name": PROVIDER,
    }
    more: dict[str, str | int | float | bool | None]
    if isinstance(request, Refused):
        more = {
            "frontline.request_id": request.request_id,
            "frontline.tenant": request.tenant,
            "error.type": request.reason,
        }
    else:
        more = _of_record(request.record)
    for name, value in more.items():
        # An absent value and an empty one mean the same.
        if value is not None and value != "":
            attributes[name] = value
    return attributes


def _of_record(record: UsageRecord) -> dict[str, str | int | float | bool | None]:
    origin, usage, served = record.origin, record.usage, record.served
    answered = record.state is State.COMPLETED
    attributes: dict[str, str | int | float | bool | None] = {
        "gen_ai.request.model": origin.model,
        "openai.request.service_tier": origin.requested and origin.requested.value,
        "frontline.request_id": origin.request_id,
        "frontline.tenant": origin.tenant,
        "frontline.key_id": origin.key_id,
        "frontline.stream": origin.stream,
        "frontline.state": record.state.value,
        "frontline.queue_s": record.queue_s,
        "frontline.tier_reason" if answered else "error.type": record.reason,
    }
    if served is not None:
        attributes |= {
            "gen_ai.response.model": origin.model,
            "openai.response.service_tier": served.value,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "frontline.usage_estimated": record.usage_estimated,
            "frontline.preemptions": record.preemptions,
            "frontline.cost_usd": float(record.cost),
            "frontline.ttft_s": record.ttft_s,
        }
    return attributes
