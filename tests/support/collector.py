"""An OTLP collector in memory, over HTTP on loopback."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Takes spans, and keeps each as a mapping; ``status`` is what it answers."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if collector.status == 200:
                    collector.spans += _spans(self.path, body)
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, **more: str) -> dict[str, str]:
        """The variables with which an ingress sends its spans here."""
        return {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            **more,
        }

    def trace(self, trace_id: str) -> dict[str, dict[str, Any]]:
        """The spans of a trace, by name."""
        return {span["name"]: span for span in self.spans if span["trace_id"] == trace_id}


def _spans(path: str, body: bytes) -> list[dict[str, Any]]:
    assert path == "/v1/traces"
    return [
        {
            "name": span.name,
            "trace_id": span.trace_id.hex(),
            "span_id": span.span_id.hex(),
            "parent_id": span.parent_span_id.hex(),
            "kind": span.kind,
            "state": span.trace_state,
            "began": span.start_time_unix_nano,
            "ended": span.end_time_unix_nano,
            "status": span.status.code,
            "attributes": _values(span.attributes),
            "resource": _values(of.resource.attributes),
        }
        for of in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in of.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
