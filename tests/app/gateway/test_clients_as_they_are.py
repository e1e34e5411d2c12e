"""What clients send that is not plain POST or GET with a bearer key."""

import asyncio
import contextlib
import json

import httpx
import pytest
import uvicorn
import websockets
from hypothesis import given
from hypothesis import strategies as st

from app.config.ingress import IngressSettings
from app.config.origins import OriginRule
from app.core.dialect import Route
from app.core.settings import SettingsError
from app.gateway.asgi import build_api
from app.gateway.handler import authorization_of
from deployments.simulator.__main__ import Server
from tests.app.gateway.test_cross_site import http
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.unit

LOCAL = ["http://localhost:*", "http://127.0.0.1:*", "https://app.example.com"]
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({b"authorization": b"Bearer a"}, "Bearer a"),
        ({b"x-api-key": b"b"}, "Bearer b"),
        ({b"api-key": b"c"}, "Bearer c"),
        ({b"authorization": b"Bearer a", b"x-api-key": b"b"}, "Bearer a"),
        ({b"x-api-key": b"", b"api-key": b"c"}, "Bearer c"),
        ({b"x-api-key": b""}, None),
        ({}, None),
    ],
)
def test_the_headers_that_hold_a_key(headers, key):
    assert authorization_of(headers) == key


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/openai/models", "/health"])
async def test_head_is_get_without_the_body(path):
    client, _ = http()
    async with client:
        whole, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
        assert (await client.head("/v1/nothing")).status_code == 404
        answer = await client.head("/v1/chat/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_the_list_of_models_may_end_with_a_slash():
    client, _ = http()
    async with client:
        assert (await client.get("/v1/models/")).json() == {"object": "list", "data": []}


@contextlib.asynccontextmanager
async def listening(ws):
    """Serve an ingress without models over a socket; yield its port."""
    _, services = http(allowed_hosts=["*"])
    config = uvicorn.Config(
        build_api(services), port=0, ws=ws, lifespan="off", log_config=None, log_level="critical"
    )
    server = Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


@pytest.mark.parametrize("ws", ["none", "websockets-sansio"])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/realtime", "/nothing"])
async def test_a_websocket_is_refused_with_426(ws, path):
    async with listening(ws) as port:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(f"ws://127.0.0.1:{port}{path}", proxy=None)
        response = caught.value.response
        assert (response.status_code, response.headers["upgrade"]) == (426, "HTTP/1.1")
        assert json.loads(response.body)["error"]["code"] == "websocket_not_supported"
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S
        ) as client:
            assert (await client.get("/v1/models")).status_code == 200


def origins(*allowed):
    return IngressSettings.load({"cors_origins": list(allowed)}, "user_config").cors_rule


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://localhost", True),
        ("http://127.0.0.1:5173", True),
        ("https://app.example.com", True),
        ("https://localhost:3000", False),
        ("http://localhost.evil.example:3000", False),
        ("http://evil.example/http://localhost:3000", False),
        ("https://app-example.com", False),
        ("https://app.example.com:8443", False),
        ("null", False),
        ("", False),
        (None, False),
    ],
)
def test_origins(origin, allowed):
    assert origins(*LOCAL).allows(origin) is allowed
    assert not origins().allows(origin)
    assert origins("*").allows(origin) is bool(origin)


@given(st.text())
def test_no_origin_is_allowed_that_is_not_named(text):
    rule = OriginRule.of(["https://a.example", "http://localhost:*"])
    for origin in (text, f"http://localhost{text}", f"http://localhost:{text}", f"{text}.example"):
        port = origin.removeprefix("http://localhost:")
        numbered = port != origin and port.isascii() and port.isdecimal() and len(port) <= 5
        named = origin in ("https://a.example", "http://localhost")
        assert rule.allows(origin) is (named or numbered)


@pytest.mark.parametrize("bad", ["localhost", "http://a/b", "http://*", "http://a:b", "a b"])
def test_what_is_no_origin_is_no_setting(bad):
    with pytest.raises(SettingsError, match="cors_origins"):
        origins(bad)


@pytest.mark.parametrize("path", ["/v1/models", *(f"/v1/{route.value}" for route in Route)])
async def test_a_preflight_needs_no_key(path):
    client, _ = http(auth="keys", cors_origins=LOCAL)
    async with client:
        answer = await client.options(path, headers={"origin": "http://localhost:3000"} | PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in answer.headers


async def test_answers_and_errors_name_an_allowed_origin_and_no_other():
    client, services = http(cors_origins=LOCAL)
    chat = {"url": "/v1/chat/completions", "json": {"model": "no/such", "messages": []}}
    async with client:
        for origin, allowed in [("http://localhost:1", True), ("http://evil.example", False)]:
            for answer in (
                await client.get("/v1/models", headers={"origin": origin}),
                await client.post(**chat, headers={"origin": origin}),
            ):
                given = answer.headers.get("access-control-allow-origin")
                assert given == (origin if allowed else None)
                assert ("x-service-tier" in answer.headers.get(
                    "access-control-expose-headers", "")) is allowed  # fmt: skip
        headers = {"origin": "http://evil.example"} | PREFLIGHT
        assert (await client.options("/v1/models", headers=headers)).status_code == 405
        # The setting is followed without a restart.
        services.settings = IngressSettings()
        answer = await client.get("/v1/models", headers={"origin": "http://localhost:1"})
        assert "access-control-allow-origin" not in answer.headers


async def test_the_lifespan_of_the_server_is_answered():
    _, services = http()
    sent = []
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message["type"])

    await build_api(services)({"type": "lifespan", "app": None}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize("path", ["/v1", "/v1/openai", "/anthropic/v1"])
@pytest.mark.parametrize("route", [Route.MESSAGES, Route.COUNT_TOKENS])
async def test_the_paths_of_anthropics_routes_and_the_shape_of_their_errors(path, route):
    client, _ = http()
    async with client:
        answer = await client.post(f"{path}/{route.value}", json={"model": "m", "messages": []})
        assert (answer.status_code, answer.json()["type"]) == (503, "error")
        answer = await client.get(f"{path}/{route.value}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_supported")
        assert answer.json()["type"] == "error"
