"""Exports spans by OTLP over HTTP, with OpenTelemetry's own exporter and its variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from app.observe.request_trace import RequestTrace
from app.observe.spans import Kind, Span

_SCOPE: Final = InstrumentationScope("frontline")
_KINDS: Final = {
    Kind.SERVER: SpanKind.SERVER,
    Kind.INTERNAL: SpanKind.INTERNAL,
    Kind.CLIENT: SpanKind.CLIENT,
}
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


class NotTaken(OSError):
    """The collector has not taken the spans; OpenTelemetry's own log says why."""


class OtlpExporter:
    """Sends spans to the collector that ``OTEL_EXPORTER_OTLP_ENDPOINT`` names.

    Args:
        environment: the variables that the resource's name may come from.
        instance: ``service.instance.id`` of the spans.
    """

    def __init__(self, environment: Mapping[str, str], instance: str) -> None:
        own = {"service.instance.id": instance}
        named = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
        if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in named:
            own["service.name"] = "frontline"
        self._resource = Resource.create(own)
        self._exporter: Any = OTLPSpanExporter()
        self._closed = False

    def export(self, traces: list[tuple[RequestTrace, list[Span]]]) -> None:
        """Send the spans of some traces, trying again for as long as the exporter does.

        Raises:
            NotTaken: the collector has not taken them.
        """
        spans = [self._readable(trace, span) for trace, of_one in traces for span in of_one]
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            raise NotTaken

    def close(self) -> None:
        """Give up what is being sent, and refuse more."""
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()

    def _readable(self, trace: RequestTrace, span: Span) -> ReadableSpan:
        # Made directly, as spans are only exported here: their ids and times are known already.
        state = None
        if trace.parent is not None and trace.parent.state:
            state = TraceState.from_header([trace.parent.state.decode()])
        parent = None
        if span.parent_id:
            parent = _context(trace, span.parent_id, state, remote=span.kind is Kind.SERVER)
        return ReadableSpan(
            span.name,
            context=_context(trace, span.span_id, state),
            parent=parent,
            resource=self._resource,
            attributes=span.attributes,
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR) if span.failed else Status(),
            start_time=span.began_ns,
            end_time=span.ended_ns,
            instrumentation_scope=_SCOPE,
        )


def _context(
    trace: RequestTrace, span_id: str, state: TraceState | None, *, remote: bool = False
) -> SpanContext:
    return SpanContext(int(trace.trace_id, 16), int(span_id, 16), remote, _SAMPLED, state)
