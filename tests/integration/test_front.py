"""What stands before the ingress, through Serve's port: heads large, odd, half-sent or many."""

import asyncio
import json
import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.support.cluster import PLAIN
from tests.support.waiting import PATIENCE_S, SLOWEST

pytestmark = pytest.mark.integration

CHAT = {"model": "native", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
BAD = b"\xff\xfe"
"""Not UTF-8."""


def address(frontline):
    parts = urlsplit(frontline.root)
    return parts.hostname, parts.port


def ask(frontline, head, wait_s=15):
    """Send bytes, and return the status, the headers and the body that come back."""
    with socket.create_connection(address(frontline), timeout=SLOWEST * wait_s) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode("latin-1").lower(), body


def get(frontline, *headers, target=b"/v1/models", method=b"GET"):
    lines = [
        method + b" " + target + b" HTTP/1.1",
        b"host: localhost",
        *headers,
        b"connection: close",
    ]
    status, head, body = ask(frontline, b"\r\n".join([*lines, b"", b""]))
    assert "content-type: application/json" in head, (head, body)
    assert "transfer-encoding" in head or json.loads(body)
    return status, json.loads(body).get("error") if body.startswith(b"{") else None


@pytest.mark.parametrize(
    "headers",
    [
        # 90a4d9f: HTML, 400.
        pytest.param([b"x-large: " + b"a" * 17_000], id="17 KB"),
        pytest.param([b"x-large: " + b"a" * 31_000], id="31 KB"),
        pytest.param([b"x-many: a"] * 101, id="101 headers"),
        pytest.param([b"x-many: a"] * 190, id="190 headers"),
        pytest.param([b"x-many: " + b"a" * 140] * 190, id="190 headers of 150 bytes"),
    ],
)
def test_large_heads_are_passed_on(frontline, headers):
    assert get(frontline, *headers) == (200, None)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([b"x-large: " + b"a" * 33_000], id="33 KB"),
        pytest.param([b"x-large: " + b"a" * 120_000], id="120 KB"),
        pytest.param([b"x-many: a"] * 201, id="201 headers"),
        pytest.param([b"x-many: a"] * 300, id="300 headers"),
        pytest.param([b"x-many: a"] * 4000, id="4,000 headers"),
    ],
)
def test_too_large_heads_are_refused_in_openais_shape(frontline, headers):
    status, error = get(frontline, *headers)
    assert (status, error["code"], error["type"]) == (
        431,
        "headers_too_large",
        "invalid_request_error",
    )


def test_openais_client_raises_what_it_raises_for_any_error(frontline):
    with pytest.raises(openai.APIStatusError) as raised:
        frontline.client().chat.completions.create(**CHAT, extra_headers={"x-large": "a" * 40_000})
    assert (raised.value.status_code, raised.value.code) == (431, "headers_too_large")
    assert raised.value.request_id


def test_too_long_a_url(frontline):
    status, error = get(frontline, target=b"/v1/models?" + b"a" * 20_000)
    assert (status, error["code"]) == (414, "url_too_long")


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-id",
        b"x-session-id",
        b"X_Session_Id",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"traceparent",
        b"tracestate",
    ],
)
def test_headers_that_serve_decodes_may_hold_anything(frontline, name):
    # 90a4d9f: 500 in plain text for most of them.
    assert get(frontline, name + b": " + BAD) == (200, None)
    assert get(frontline, name + b": fine", name + b": " + BAD) == (200, None)


def test_a_request_id_of_the_clients_own_is_kept(frontline):
    with frontline.http() as http:
        assert http.get("/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] == (
            "mine"
        )


def test_clients_do_not_set_serves_timeout(frontline):
    # 90a4d9f: 408 in plain text.
    with frontline.http() as http:
        answer = http.post(
            "/v1/chat/completions", json=CHAT, headers={"x-request-timeout-seconds": "0.000001"}
        )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "headers", "target", "status"),
    [
        pytest.param(b"FOO", [], b"/v1/models", 400, id="an unknown method"),
        pytest.param(b"GET", [b"x: a\x01b"], b"/v1/models", 400, id="a control character"),
        pytest.param(
            b"GET",
            [
                *(b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-version: 13"),
                b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
            ],
            b"/v1/realtime",
            404,
            id="WebSocket",
        ),
    ],
)
def test_what_our_application_does_not_see_is_refused_in_openais_shape(
    frontline, method, headers, target, status
):
    # 90a4d9f: plain text.
    answered, error = get(frontline, *headers, target=target, method=method)
    assert (answered, set(error)) == (status, {"message", "type", "param", "code"})


def test_half_sent_heads_stop_nobody(frontline):
    # 90a4d9f: the next request waits until they go, a minute and more.
    with ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(address(frontline), timeout=SLOWEST * 15))
            for _ in range(4300)
        ]
        for one in held:
            one.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n")
        began = time.monotonic()
        with frontline.http() as http:
            assert (
                http.post("/v1/chat/completions", json=CHAT, timeout=PATIENCE_S).status_code == 200
            )
        print(f"\nanswered {time.monotonic() - began:.2f} s beside {len(held)} half-sent heads")
        # They are let go; HAProxy answers those itself.
        assert held[0].recv(4096).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < SLOWEST * 15


async def test_4200_open_requests_stop_nobody(frontline):
    # 90a4d9f: silence beyond 4,096 connections.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=frontline.root, verify=PLAIN, timeout=PATIENCE_S, limits=limits
    ) as client:
        body = json.dumps(CHAT).encode()
        writers = []
        for _ in range(4200):
            _, writer = await asyncio.open_connection(*address(frontline))
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(body), body[:-1])
            )
            writers.append(writer)
        began = time.monotonic()
        answer = await client.post("/v1/chat/completions", json=CHAT, timeout=PATIENCE_S)
        print(f"\n{answer.status_code} {time.monotonic() - began:.2f} s beside {len(writers)} open")
        assert answer.status_code == 200
        for writer in writers:
            writer.close()
