"""What a browser can be made to send without asking must not be served on an open loopback."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.hosts import HostRule
from app.config.ingress import IngressSettings
from app.core.errors import HostNotAllowed, UnsupportedMediaType
from app.core.settings import SettingsError
from app.gateway.asgi import build_api
from app.gateway.cross_site import require_json
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.tenants.access import Access

pytestmark = pytest.mark.unit

LOOPBACK = HostRule.of([])
# The Fetch standard's CORS-safelisted types: a page may send them anywhere without a preflight.
SAFELISTED = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
REVEALING = [
    ("GET", "/v1/models"), ("GET", "/v1/models/some"), ("GET", "/v1/usage"), ("GET", "/v1/me"),
    *(("POST", f"/v1/{route}") for route in ("completions", "chat/completions", "embeddings")),
    ("POST", "/v1/responses"),
]  # fmt: skip


def http(**settings):
    """A client of a ready ingress without models."""
    services = Services(ModelRegistry(None, discover_s=1), None, IngressSettings(**settings))
    services.ready.set()
    transport = httpx.ASGITransport(build_api(services), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000"), services


@pytest.mark.parametrize(
    "given",
    [b"application/json", b"Application/JSON", b"application/json; charset=utf-8",
     b" application/json ;charset=utf-8", b"application/vnd.api+json"],
)  # fmt: skip
def test_json_is_taken(given):
    require_json({b"content-type": given})


@given(st.sampled_from(SAFELISTED), st.text(st.characters(codec="latin-1"), max_size=30))
def test_no_type_that_needs_no_preflight_is_taken(essence, parameters):
    for sent in (essence, f"{essence};{parameters}", f"{essence}; {parameters},application/json"):
        with pytest.raises(UnsupportedMediaType):
            require_json({b"content-type": sent.encode("latin-1")})


@pytest.mark.parametrize("headers", [{}, {b"content-type": b""}])
def test_no_type_at_all_is_not_taken(headers):
    with pytest.raises(UnsupportedMediaType, match="Missing Content-Type"):
        require_json(headers)


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:80",
     "127.8.8.8:8000", "[::1]", "[::1]:8000"],
)  # fmt: skip
def test_loopback_is_always_served(host):
    for rule in (LOOPBACK, HostRule.of(["api.example"])):
        rule.require({b"host": host.encode()})


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z0-9]{2,8}){0,3}", fullmatch=True)


@given(NAMES, st.sampled_from(["", ":8000", "."]))
def test_a_page_cannot_bring_a_name_of_its_own(name, tail):
    headers = {b"host": (name + tail).encode()}
    if name != "localhost" and not name.startswith("127."):
        assert not LOOPBACK.allows(headers)
        with pytest.raises(HostNotAllowed):
            LOOPBACK.require(headers)
    assert HostRule.of([name.upper()]).allows(headers)
    assert HostRule.of(["*"]).allows(headers)


@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_nothing_that_is_not_a_loopback_host_passes(host):
    allowed = LOOPBACK.allows({b"host": host.encode("latin-1")})
    assert not allowed or host.lower().startswith(("localhost", "127.", "[::1]"))


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0:8000", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "evil@localhost",
     "localhost@evil.example", "localhost:8000:1", "[::1].evil.example", "", "10.0.0.5", "[::2]"],
)  # fmt: skip
def test_what_only_looks_like_loopback_is_not_served(host):
    assert not LOOPBACK.allows({b"host": host.encode()})
    assert not LOOPBACK.allows({})


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, False),
        ({"auth": "keys"}, True),
        ({"open_to_network": True}, True),
        ({"open_to_network": True, "allowed_hosts": ["api.example"]}, False),
        ({"auth": "keys", "allowed_hosts": []}, False),
        ({"allowed_hosts": ["api.example", "other.example"]}, True),
        ({"allowed_hosts": ["*"]}, True),
    ],
)
def test_whose_names_are_served_follows_from_who_may_call(settings, served):
    rule = IngressSettings(**settings).host_rule
    assert rule.allows({b"host": b"other.example:8000"}) == served


@pytest.mark.parametrize("name", ["api.example:8000", "http://api.example", "[::1]", "", "a b"])
def test_an_allowed_host_is_a_bare_name(name):
    with pytest.raises(SettingsError, match=r"allowed_hosts\.0"):
        IngressSettings.load({"allowed_hosts": [name]}, "user_config")


@pytest.mark.parametrize(("method", "path"), REVEALING)
async def test_after_dns_rebinding_no_route_reveals_anything(method, path):
    client, _ = http()
    async with client:
        headers = {"host": "evil.example:8000", "content-type": "application/json"}
        answer = await client.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert "evil" not in answer.text


@pytest.mark.parametrize(("method", "path"), [one for one in REVEALING if one[0] == "POST"])
@pytest.mark.parametrize("given", [*SAFELISTED, None])
async def test_a_form_of_another_site_is_refused_before_its_body_is_read(method, path, given):
    client, _ = http()
    async with client:
        headers = {} if given is None else {"content-type": given}
        answer = await client.request(method, path, headers=headers, content=b'{"model":"some"}')
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
        assert "-H 'Content-Type: application/json'" in error["message"]
        # The preflight that JSON needs is not granted.
        asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        preflight = await client.options(path, headers=asked)
        assert preflight.status_code == 405
        assert not [name for name in preflight.headers if name.startswith("access-control")]


async def test_a_key_is_asked_for_before_the_content_type():
    client, services = http(auth="keys")
    services.access = Access("one", None, None)
    async with client:
        answer = await client.post("/v1/completions", headers={"host": "evil.example"})
        assert answer.status_code == 401


async def test_health_answers_probes_by_address():
    client, _ = http()
    async with client:
        for host in ("10.1.2.3:8000", "evil.example"):
            assert (await client.get("/health", headers={"host": host})).status_code == 200
