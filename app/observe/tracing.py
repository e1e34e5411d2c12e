"""OpenTelemetry traces, set by its standard environment variables. Off unless they say so."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Final, Protocol

from app.core.settings import Problem, SettingsError
from app.core.trace_context import SAMPLED, TraceContext, parse_trace_context
from app.core.trace_variables import one_of, traces_are_on
from app.observe.backlog import Backlog
from app.observe.observers import Ended, Refused
from app.observe.request_trace import RequestTrace, new_trace_id
from app.observe.spans import Span, spans_of

MOST_WAITING: Final = 4096
"""Most requests whose spans wait to be exported: about 10 MB."""
_BATCH: Final = 128
CLOSE_S: Final = 5.0
"""How long an ingress that stops waits for its last spans to be exported."""
_LARGEST_ID: Final = 1 << 64
_SAMPLERS: Final = ("always_on", "always_off", "traceidratio")
_PARENT_BASED: Final = "parentbased_"

_Waiting = tuple[Ended | Refused, RequestTrace, int]


class Exporter(Protocol):
    """Sends spans to a collector: ``app.observe.otlp``."""

    def export(self, traces: list[tuple[RequestTrace, list[Span]]]) -> None:
        """Send the spans of some traces. Blocks.

        Raises:
            OSError: the collector has not taken them.
        """
        ...

    def close(self) -> None:
        """Give up what is being sent, and refuse more."""
        ...


class Sampler:
    """Decides which requests are recorded.

    Args:
        ratio: share of the traces that begin here, from 0 to 1, by trace id.
        parent_based: whether the client's decision holds for its traces.
    """

    def __init__(self, ratio: float, *, parent_based: bool) -> None:
        self._bound = ratio * _LARGEST_ID
        self._parent_based = parent_based

    def records(self, trace_id: str, parent: TraceContext | None) -> bool:
        """Return whether a request's spans are recorded."""
        if parent is not None and self._parent_based:
            return bool(parent.flags & SAMPLED)
        # The same arithmetic as OpenTelemetry's own samplers, which thus choose the same traces.
        return int(trace_id[16:], 16) < self._bound


class Tracing:
    """Begins the traces of requests, and exports their spans. Belongs to the event loop.

    Args:
        sampler: decides which requests are recorded.
        exporter: gets the spans, on a thread.
    """

    def __init__(self, sampler: Sampler, exporter: Exporter) -> None:
        self._sampler = sampler
        self._exporter = exporter
        self._backlog: Backlog[_Waiting] = Backlog(
            "traces", self._export, most=MOST_WAITING, batch=_BATCH
        )

    def begin(self, headers: Mapping[bytes, bytes]) -> RequestTrace:
        """Return the trace of a request with these headers."""
        parent = parse_trace_context(headers)
        trace_id = new_trace_id() if parent is None else parent.trace_id
        recorded = self._sampler.records(trace_id, parent)
        return RequestTrace.begin(parent, trace_id, recorded=recorded)

    def ended(self, request: Ended) -> None:
        """Export the spans of a request to a known model."""
        self._put(request)

    def refused(self, request: Refused) -> None:
        """Export the span of a request that ended before its model was known."""
        self._put(request)

    def close(self) -> None:
        """Export what waits, for some seconds, and end the thread. Blocks."""
        if not self._backlog.close(CLOSE_S):
            self._exporter.close()
            self._backlog.close()
        self._exporter.close()

    def _put(self, request: Ended | Refused) -> None:
        trace = request.context.trace
        if trace is not None and trace.recorded:
            self._backlog.put((request, trace, time.time_ns()))

    def _export(self, batch: list[_Waiting]) -> None:
        self._exporter.export(
            [(trace, spans_of(request, trace, ended_ns)) for request, trace, ended_ns in batch]
        )


def tracing_of(environment: Mapping[str, str], instance: str) -> Tracing | None:
    """Return what the environment variables ask for; ``None`` if traces are off.

    ``instance`` names this ingress in its spans.

    Raises:
        SettingsError: a variable has a value that is not supported.
    """
    if not traces_are_on(environment):
        return None
    sampler = sampler_of(environment)
    # Loaded only now: it is not needed while traces are off.
    from app.observe.otlp import OtlpExporter

    return Tracing(sampler, OtlpExporter(environment, instance))


def sampler_of(environment: Mapping[str, str]) -> Sampler:
    """Return the sampler that ``OTEL_TRACES_SAMPLER`` and ``OTEL_TRACES_SAMPLER_ARG`` name.

    Raises:
        SettingsError: a variable has a value that is not supported.
    """
    names = (*_SAMPLERS, *(_PARENT_BASED + name for name in _SAMPLERS))
    name = one_of(environment, "OTEL_TRACES_SAMPLER", names, "parentbased_always_on")
    kind = name.removeprefix(_PARENT_BASED)
    ratio = _ratio(environment) if kind == "traceidratio" else float(kind == "always_on")
    return Sampler(ratio, parent_based=name.startswith(_PARENT_BASED))


def _ratio(environment: Mapping[str, str]) -> float:
    name = "OTEL_TRACES_SAMPLER_ARG"
    text = environment.get(name, "").strip() or "1"
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        raise SettingsError(Problem((name,), f"expected a number from 0 to 1 (got {text!r})"))
    return ratio
