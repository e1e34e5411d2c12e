"""The access log of a real ingress: one line a request, beside Serve's own log."""

import json
from functools import partial
from pathlib import Path

import pytest
from ray.serve._private.logging_utils import get_serve_logs_dir

from tests.support.cluster import eventually

pytestmark = pytest.mark.integration


def lines_of(client_request_id):
    folder = Path(get_serve_logs_dir())
    return [
        one
        for path in folder.glob("access_ingress_Ingress_*.log")
        for text in path.read_text().splitlines()
        if (one := json.loads(text))["client_request_id"] == client_request_id
    ]


def test_each_request_has_a_line_beside_serves_log(frontline):
    chat = {"model": "native", "messages": [], "max_tokens": 3, "service_tier": "priority"}
    with frontline.http() as http:
        for body in (chat, {**chat, "model": "nothing"}):
            http.post("/v1/chat/completions", json=body, headers={"x-request-id": "trace-me"})
    eventually(lambda: len(lines_of("trace-me")) == 2)
    served, refused = lines_of("trace-me")
    assert (served["status"], served["model"], served["served_tier"]) == (
        200, "test/native", "priority",
    )  # fmt: skip
    assert served["completion_tokens"] == 3 and 0 < served["ttft_s"] < served["duration_s"]
    assert (refused["status"], refused["reason"]) == (404, "model_not_found")
    eventually(partial(frontline.records, request_id=served["request_id"]))
