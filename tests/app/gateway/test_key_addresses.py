"""From where a key may be used, through a whole ingress."""

import logging
from ipaddress import ip_network

import httpx
import pytest

from app import alarms
from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.config.usage_reads import UsageSettings
from app.gateway.asgi import build_api
from app.gateway.usage_reader import UsageReader
from app.haproxy.config import CLIENT_HEADER
from app.tenants.scope import KeyScope
from app.web.routes import add_web_routes
from tests.support.waiting import until
from tests.support.world import ALIAS, KEYS, MODEL, World

pytestmark = pytest.mark.unit

CHAT = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
MESSAGE = CHAT | {"max_tokens": 1}
PROOF = "a" * 64
INSIDE, OUTSIDE = "10.1.2.3", "192.0.2.1"
NETWORKS = frozenset({ip_network("10.0.0.0/8"), ip_network("fd00::/8")})
REFUSED = "address_not_allowed"
ROUTES = ["/v1/me", "/v1/models", f"/v1/models/{ALIAS}", "/v1/usage", "/anthropic/v1/models"]


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(KEYS, "bound", {"scope": KeyScope(addresses=NETWORKS)})
    made = World(tmp_path, timeout_s=30)
    made.services.proxy_proof = PROOF
    trusted = made.services.settings.model_dump() | {"trusted_proxies": ["172.16.0.0/12"]}
    made.services.settings = IngressSettings.model_validate(trusted)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    made.services.usage = UsageReader(made.store_url, UsageSettings())
    yield made
    made.services.usage.close()
    await made.close()


def come_from(address, *forwarded, proof=PROOF):
    """The headers of a request as HAProxy passes them on."""
    lines = [("x-forwarded-for", value) for value in forwarded]
    return [*lines, (CLIENT_HEADER, f"{proof} {address}")]


async def ask(http, path="/v1/me", headers=(), json=None):
    method = "GET" if json is None else "POST"
    return await http.request(method, path, headers=httpx.Headers(list(headers)), json=json)


@pytest.mark.parametrize(
    "headers",
    [
        come_from(INSIDE),
        come_from("fd00::1"),
        come_from(f"::ffff:{INSIDE}"),
        come_from("172.16.0.1", INSIDE),
        come_from("172.16.0.1", f"{OUTSIDE}, {INSIDE}:4711, 172.20.0.1"),
        come_from("172.16.0.1", OUTSIDE, INSIDE),
    ],
)
async def test_a_key_is_served_from_its_addresses(world, headers):
    async with world.client("bound") as http:
        assert (await ask(http, "/v1/chat/completions", headers, CHAT)).status_code == 200
        for path in ROUTES:
            assert (await ask(http, path, headers)).status_code == 200
        assert (await ask(http, "/v1/me", headers)).json()["addresses"] == [
            "10.0.0.0/8",
            "fd00::/8",
        ]


@pytest.mark.parametrize(
    "headers",
    [
        come_from(OUTSIDE),
        come_from(OUTSIDE, INSIDE),
        come_from(f"::ffff:{OUTSIDE}", INSIDE),
        come_from("172.16.0.1", f"{INSIDE}, {OUTSIDE}"),
        come_from("172.16.0.1", INSIDE, OUTSIDE),
        # Unknown.
        [],
        [("x-forwarded-for", INSIDE)],
        come_from(INSIDE, proof="b" * 64),
        come_from(INSIDE, proof=""),
        come_from("localhost"),
        come_from("172.16.0.1"),
        come_from("172.16.0.1", "unknown"),
    ],
)
async def test_a_key_is_refused_elsewhere(world, headers):
    async with world.client("bound") as http:
        for path in ROUTES:
            answer = await ask(http, path, headers)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == REFUSED
        for path, body in [("chat/completions", CHAT), ("request-costs", {"request_ids": ["x"]})]:
            answer = await ask(http, f"/v1/{path}", headers, body)
            assert answer.status_code == 403
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == (REFUSED, "invalid_request_error")
            assert "10.0" not in answer.text and "fd00" not in answer.text
        answer = await ask(http, "/v1/messages", headers, MESSAGE)
        assert answer.status_code == 403
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "permission_error"
        health = await ask(http, "/health", headers)
        assert "models" not in health.json()
    assert world.taken() == 0


async def test_without_a_proof_here_no_header_has_one(world):
    world.services.proxy_proof = None
    async with world.client("bound") as http:
        for headers in (come_from(INSIDE), come_from(INSIDE, proof="None")):
            assert (await ask(http, headers=headers)).json()["error"]["code"] == REFUSED


async def test_only_an_unknown_address_raises_an_alarm(world):
    def raised():
        return alarms.PROCESS.counts().get("client address unknown", 0)

    before = raised()
    async with world.client("bound") as http:
        await ask(http, headers=come_from(OUTSIDE))
        assert raised() == before
        await ask(http, headers=[("x-forwarded-for", INSIDE)])
        assert raised() == before + 1


async def test_a_refusal_is_told_with_its_key(world):
    seen = []

    class Watching:
        def refused(self, request):
            seen.append(request)

        def ended(self, request):
            pass

    world.services.observers.add(Watching())
    async with world.client("bound") as http:
        await ask(http, "/v1/chat/completions", come_from(OUTSIDE), CHAT)
    await until(lambda: seen)
    [one] = seen
    assert (one.status, one.reason, one.tenant) == (403, REFUSED, "bound")
    assert one.key_id in world.key("bound")


async def test_a_key_without_addresses_is_used_from_everywhere(world):
    async with world.client("plain") as http:
        for headers in ([], come_from(OUTSIDE), [("x-forwarded-for", "junk")]):
            assert (await ask(http, headers=headers)).status_code == 200
        assert (await http.get("/v1/me")).json()["addresses"] is None


async def test_pages_keep_to_it_too(world, caplog):
    caplog.set_level(logging.CRITICAL)
    app = build_api(world.services, add_web_routes)
    site = {"sec-fetch-site": "same-origin"}
    inside, outside = dict(come_from(INSIDE)), dict(come_from(OUTSIDE))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
    ) as browser:
        form = {"key": world.key("bound")}
        answer = await browser.post("/login", data=form, headers=site | outside)
        assert answer.status_code == 403 and "set-cookie" not in answer.headers
        assert "may not be used from the address" in answer.text
        answer = await browser.post("/login", data=form, headers=site | inside)
        assert answer.status_code == 303 and "set-cookie" in answer.headers
        page = {"accept": "text/html"}
        assert (await browser.get("/usage", headers=page | inside)).status_code == 200
        assert (await browser.get("/usage", headers=page | outside)).status_code == 403
        answer = await browser.get(f"/models/{MODEL}", headers=page | outside)
        assert answer.status_code == 403
