"""What a client sees when something is wrong: OpenAI's shape, and nothing of the inside."""

import socket
import time
from urllib.parse import urlsplit

import pytest

from tests.support.cluster import eventually, ingress_app, simulated_app
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.integration

JSON = {"content-type": "application/json"}
CHAT = {"model": "native", "messages": [{"role": "user", "content": "hello"}]}


def post(frontline, path="/v1/chat/completions", **request):
    with frontline.http() as http:
        answer = http.post(path, **request)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers.get_list("x-request-id")) == 1
    return answer, error


def test_malformed_json(frontline):
    answer, error = post(frontline, content=b'{"model": ', headers=JSON)
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")


def test_a_form_of_another_site(frontline):
    answer, error = post(frontline, data={"model": "native"})
    assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")


def test_a_host_of_another_site(frontline):
    answer, error = post(frontline, json=CHAT, headers={"host": "evil.example"})
    assert (answer.status_code, error["code"]) == (403, "host_not_allowed")
    with frontline.http() as http:
        assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        assert http.get("/health", headers={"host": "10.1.2.3"}).status_code == 200


def test_unknown_model(frontline):
    answer, error = post(frontline, json={**CHAT, "model": "nope"})
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_unknown_route(frontline):
    answer, error = post(frontline, "/v1/nothing", json={})
    assert (answer.status_code, error["code"]) == (404, "unknown_url")


def test_wrong_method(frontline):
    with frontline.http() as http:
        answer = http.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_supported"


def test_too_long_a_prompt(frontline):
    long = {"role": "user", "content": "word " * 5000}
    answer, error = post(frontline, json={**CHAT, "messages": [long]})
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages"


def test_a_route_that_the_model_does_not_have(frontline):
    answer, error = post(frontline, "/v1/embeddings", json={"model": "fcfs", "input": "x"})
    assert (answer.status_code, error["param"]) == (400, "model")


def test_too_large_a_body(frontline):
    frontline.deploy(ingress_app(max_body_bytes=1000))
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with frontline.http() as http:
                answer = http.post("/v1/chat/completions", content=b"x" * 1001, headers=JSON)
            if answer.status_code == 413:
                break
            time.sleep(0.2)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (413, "request_too_large")
        with frontline.http() as http:  # without a declared length
            pieces = iter([b"x" * 600] * 2)
            answer = http.post("/v1/chat/completions", content=pieces, headers=JSON)
        assert answer.status_code == 413
    finally:
        frontline.deploy(ingress_app())


def test_a_client_that_never_finishes_its_body_is_let_go(frontline):
    frontline.deploy(ingress_app(body_timeout_s=1))
    try:
        time.sleep(3)  # the setting reaches the replica
        address = urlsplit(frontline.root)
        with socket.create_connection(
            (address.hostname, address.port), timeout=SLOWEST * 15
        ) as slow:
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
            )
            assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]
    finally:
        frontline.deploy(ingress_app())


def test_an_engine_that_is_not_ready(frontline):
    frontline.deploy(simulated_app("sleepy", startup_seconds=600))
    try:
        entry = eventually(lambda: frontline.entry("sleepy"), 90, "the model is not listed")
        assert entry["service_tiers"] == []
        answer, error = post(frontline, json={**CHAT, "model": "sleepy"})
        assert (answer.status_code, error["code"]) == (503, "engine_not_ready")
        assert int(answer.headers["retry-after"]) > 0
        assert int(answer.headers["retry-after-ms"]) > 0
    finally:
        frontline.remove("sleepy")


def test_an_engines_own_failure_tells_nothing_of_the_inside(frontline):
    with frontline.engine("native") as engine:
        engine.post("/simulate", json={"failures": {"request": "error", "status": 500}})
        try:
            answer, error = post(frontline, json=CHAT)
            inside = urlsplit(str(engine.base_url)).netloc
        finally:
            engine.post("/simulate", json={"failures": {}})
    assert (answer.status_code, error["type"]) == (500, "server_error")
    assert inside not in answer.text and "/" not in error["message"]
