"""Traces of a real ingress behind Serve's HAProxy, to a collector over HTTP."""

import pytest

from tests.support.cluster import eventually, ingress_app
from tests.support.collector import Collector

pytestmark = pytest.mark.integration

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector(frontline):
    made = Collector()
    app = ingress_app()
    app["deployments"][0]["ray_actor_options"]["runtime_env"] = {"env_vars": made.environment()}
    frontline.deploy(app)
    yield made
    frontline.restore_ingress()
    made.close()


def test_a_request_is_traced_from_its_client_to_its_engine(frontline, collector):
    chat = {"model": "native", "messages": [], "max_tokens": 2, "service_tier": "priority"}
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": f"a={'x' * 200},b={'y' * 200}"}
    with frontline.http() as http, frontline.engine("native") as engine:

        def traced():
            http.post("/v1/chat/completions", json=chat, headers=headers)
            return collector.trace(TRACE)

        # The ingress before it may still answer.
        spans = eventually(traced, 60)
        server, call = spans["POST /v1/chat/completions"], spans["chat test/native"]
        assert (server["parent_id"], call["parent_id"]) == (SPAN, server["span_id"])
        assert server["state"] == headers["tracestate"]
        assert server["attributes"]["openai.response.service_tier"] == "priority"
        heard = [
            one["headers"].get("traceparent") for one in engine.get("/simulate").json()["requests"]
        ]
        assert f"00-{TRACE}-{call['span_id']}-01" in heard
