"""Requests whose traces an engine joins with spans of its own."""

import secrets

from tests.support.cluster import eventually

CLIENTS_SPAN = "00f067aa0ba902b7"
PROMPT = "What is the capital of France?"


class Traces:
    """Sends requests to a model, and finds their spans in a collector."""

    def __init__(self, deployment, collector, model, engine):
        self._deployment, self._collector = deployment, collector
        self._model, self._engine = model, engine

    def ask(self, flags):
        """Send a request of a client's trace with these flags; return its trace id."""
        trace_id = secrets.token_hex(16)
        answer = self._deployment.client().chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=8,
            temperature=0,
            service_tier="priority",
            extra_headers={"traceparent": f"00-{trace_id}-{CLIENTS_SPAN}-{flags}"},
        )
        assert answer.service_tier == "priority"
        return trace_id

    def spans(self, trace_id):
        return [span for span in self._collector.spans if span["trace_id"] == trace_id]

    def own(self, trace_id):
        """The engine's own spans of a trace."""
        return [s for s in self.spans(trace_id) if s["resource"]["service.name"] == self._engine]

    def lost(self, trace_id):
        """The spans whose parents have not come."""
        known = {CLIENTS_SPAN} | {span["span_id"] for span in self.spans(trace_id)}
        return [span for span in self.spans(trace_id) if span["parent_id"] not in known]

    def joined(self, trace_id):
        """Wait for a whole trace; return the ingress's spans, and the engine's span below them."""
        eventually(lambda: len(self.spans(trace_id)) - len(self.own(trace_id)) == 3)

        def ours():
            found = self.spans(trace_id)
            return {s["name"]: s for s in found if s["resource"]["service.name"] == "frontline"}

        server = ours()["POST /v1/chat/completions"]
        [call] = (s for name, s in ours().items() if name.startswith("chat "))
        [root] = eventually(
            lambda: [s for s in self.own(trace_id) if s["parent_id"] == call["span_id"]]
        )
        return server, call, root


def check_joined(traces):
    """Check that the engine's spans are part of the trace of the request that they belong to."""
    unsampled = traces.ask("00")
    trace_id = traces.ask("01")
    server, call, root = traces.joined(trace_id)
    assert (server["parent_id"], call["parent_id"]) == (CLIENTS_SPAN, server["span_id"])
    told = server["attributes"]
    assert told["openai.request.service_tier"] == told["openai.response.service_tier"] == "priority"
    assert call["began"] <= root["began"] <= root["ended"]
    # Each process of an engine sends its own, a span after those inside it.
    eventually(lambda: not traces.lost(trace_id), why=str(traces.spans(trace_id)))
    assert not traces.spans(unsampled), "neither the ingress nor the engine records it"
    assert PROMPT not in str(traces.spans(trace_id))
    return server, root
