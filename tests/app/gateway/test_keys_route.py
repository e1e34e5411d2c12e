"""What admin keys do with keys, through the HTTP application on a real store."""

import asyncio
import logging
import threading
from ipaddress import ip_network

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from app.config.ingress import IngressSettings
from app.core.errors import InvalidRequest
from app.core.tiers import Tier
from app.gateway import key_admin
from app.gateway.asgi import build_api
from app.gateway.key_admin import KeyAdmin
from app.gateway.keys_route import page
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.store.database import connect, migrate
from app.tenants import key_cache
from app.tenants.access import Access
from app.tenants.key_store import KeyStore
from app.tenants.keys import KeyLimits, create_key
from app.tenants.scope import KeyScope
from tests.support.records import NOON

pytestmark = pytest.mark.unit

FIELDS = {
    "object", "id", "tenant", "name", "admin", "default_tier", "tiers", "rpm", "tpm",
    "priority_share", "in_flight", "models", "routes", "addresses", "budgets", "created_at",
    "expires_at", "revoked_at",
}  # fmt: skip
SCOPED = {
    "admin": True,
    "tiers": [Tier.FLEX],
    "limits": KeyLimits(rpm=60),
    "scope": KeyScope(models=frozenset({"acme/*"})),
}


@pytest.fixture
def engine(tmp_path):
    made = connect(make_url(f"sqlite:///{tmp_path}/usage.db"))
    migrate(made)
    yield made
    made.dispose()


@pytest.fixture
def store(engine):
    return KeyStore(engine)


@pytest.fixture
async def services(store, monkeypatch):
    monkeypatch.setattr(key_cache, "SOONEST_S", 0.0)
    monkeypatch.setattr(key_cache, "REFRESH_S", 0.02)
    made = Services(ModelRegistry(None, discover_s=1), None, IngressSettings(auth="keys"))
    access, keys = Access("ingress", store, None), KeyAdmin(store)
    made.access, made.key_admin = access, keys
    access.start()
    made.ready.set()
    yield made
    await access.stop()
    keys.close()


@pytest.fixture
async def client(services, store):
    """Returns an HTTP client that sends a new key."""
    transport = httpx.ASGITransport(build_api(services))
    opened = []

    def sending(tenant="ops", **more):
        key, text = create_key(tenant, created=NOON, **more)
        store.add(key)
        headers = {"authorization": f"Bearer {text}"}
        one = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)
        opened.append(one)
        return one

    yield sending
    for each in opened:
        await each.aclose()


@pytest.fixture
def admin(client):
    return client(admin=True)


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]


async def works(services, text):
    transport = httpx.ASGITransport(build_api(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        answer = await http.get("/v1/me", headers={"x-api-key": text})
    return answer.status_code == 200


@pytest.mark.parametrize("prefix", ["/v1", "/v1/openai"])
async def test_a_key_lives_from_its_creation_to_its_end(admin, services, store, prefix):
    given = {"tenant": "acme", "name": "ci", "rpm": 60, "budgets": ["month=5"], "tiers": ["flex"]}
    made = await admin.post(f"{prefix}/keys", json=given)
    assert made.status_code == 200 and made.headers["cache-control"] == "no-store"
    body = made.json()
    text = body.pop("value")
    assert body.keys() == FIELDS and await works(services, text)
    assert {name: body[name] for name in given} == given | {"tiers": ["default", "flex"]}
    path = f"{prefix}/keys/{body['id']}"
    assert (await admin.get(path)).json() == body
    changes = {"rpm": None, "priority_share": 0.25, "addresses": ["10.0.0.0/8"], "name": "new"}
    changed = (await admin.post(path, json=changes)).json()
    assert changed == body | changes
    assert (await admin.get(path)).json() == changed
    ended = await admin.delete(path)
    assert ended.json() == {"object": "key.deleted", "id": body["id"], "deleted": True}
    async with asyncio.timeout(10):
        while await works(services, text):
            await asyncio.sleep(0.01)
    assert isinstance((await admin.get(path)).json()["revoked_at"], int)
    for again in (await admin.delete(path), await admin.post(path, json={"rpm": 1})):
        assert error_of(again) == (404, "key_not_found", None)
    [stored] = [key for key in store.all() if key.key_id == body["id"]]
    assert stored.scope.addresses == {ip_network("10.0.0.0/8")} and stored.revoked is not None
    assert stored.secret_hash not in made.text and text not in (await admin.get(path)).text


async def test_changed_rights_hold_within_a_moment(admin, client, services, store):
    tenant = client("acme")
    assert (await tenant.get("/v1/me")).json()["routes"] is None
    [key] = [key for key in store.all() if key.tenant == "acme"]
    await admin.post(f"/v1/keys/{key.key_id}", json={"routes": ["embeddings"]})
    async with asyncio.timeout(10):
        while (await tenant.get("/v1/me")).json()["routes"] != ["embeddings"]:
            await asyncio.sleep(0.01)


CALLS = [
    ("GET", "/v1/keys"), ("POST", "/v1/keys"), ("GET", "/v1/keys/0011"),
    ("POST", "/v1/keys/0011"), ("DELETE", "/v1/keys/0011"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_only_an_admin_key_may(client, services, store, method, path):
    tenant = client("acme")
    before = store.all()
    answer = await tenant.request(method, path, json={"tenant": "acme", "admin": True})
    assert error_of(answer) == (403, "admin_key_required", None)
    tenant.headers["authorization"] = "Bearer none"
    answer = await tenant.request(method, path, json={"tenant": "acme"})
    assert error_of(answer) == (401, "invalid_api_key", None)
    assert store.all() == before
    services.access = services.key_admin = None
    services.settings = IngressSettings()
    answer = await tenant.request(method, path, json={"tenant": "acme"})
    assert error_of(answer) == (404, "unknown_url", None)


async def test_other_methods_are_not_allowed(admin):
    for path, allowed in (("/v1/keys", {"GET", "POST"}), ("/v1/keys/1", {"GET", "POST", "DELETE"})):
        answer = await admin.put(path, json={})
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tenant"),
        ({"tenant": "acme", "rpm": 0}, "rpm"),
        ({"tenant": "acme", "addresses": ["10.0.0.1/8"]}, "addresses"),
        ({"tenant": "acme", "models": []}, "models"),
        ({"tenant": "acme", "key_id": "0" * 16}, "key_id"),
        ({"tenant": "acme", "default_tier": "flex", "tiers": []}, "default_tier"),
        ([], None),
        ("text", None),
    ],
)
async def test_a_wrong_field_is_named(admin, store, body, param):
    before = store.all()
    answer = await admin.post("/v1/keys", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert store.all() == before


async def test_what_is_no_json_is_refused(admin):
    answer = await admin.post("/v1/keys", content=b"{}")
    assert error_of(answer) == (415, "unsupported_media_type", None)
    headers = {"content-type": "application/json"}
    assert (await admin.post("/v1/keys", content=b"{", headers=headers)).status_code == 400
    long = await admin.post("/v1/keys", content=b" " * 100_000, headers=headers)
    assert error_of(long) == (413, "request_too_large", None)


async def test_nobody_gets_more_rights_than_the_admin_key_has(client, admin, store):
    scoped = client(**SCOPED)
    own = {"tenant": "acme", "models": ["acme/m"], "tiers": ["flex"], "rpm": 10}
    made = (await scoped.post("/v1/keys", json=own | {"admin": True})).json()
    for more, param in [
        ({"models": None}, "models"),
        ({"models": ["*"]}, "models"),
        ({"tiers": None}, "tiers"),
        ({"rpm": 61}, "rpm"),
        ({"rpm": None}, "rpm"),
    ]:
        answer = await scoped.post("/v1/keys", json={**own, **more})
        assert error_of(answer) == (403, "beyond_own_rights", param)
    path = f"/v1/keys/{made['id']}"
    before = store.all()
    assert error_of(await scoped.post(path, json={"rpm": None})) == (
        403,
        "beyond_own_rights",
        "rpm",
    )
    # Nor itself.
    [itself] = [key for key in before if key.limits.rpm == 60]
    answer = await scoped.post(f"/v1/keys/{itself.key_id}", json={"models": None})
    assert error_of(answer) == (403, "beyond_own_rights", "models")
    assert store.all() == before
    assert (await scoped.post(path, json={"rpm": 60})).json()["rpm"] == 60
    assert (await admin.post(path, json={"rpm": None})).json()["rpm"] is None


async def test_keys_are_listed_in_pages(admin, client, store):
    for number in range(4):
        client(f"t{number}")
    ids = [key.key_id for key in store.all()]
    seen, after = [], None
    while True:
        query = {"limit": "2"} | ({} if after is None else {"after": after})
        told = (await admin.get("/v1/keys", params=query)).json()
        page_ids = [one["id"] for one in told["data"]]
        assert (told["object"], told["first_id"], told["last_id"]) == (
            "list",
            page_ids[0],
            page_ids[-1],
        )
        seen += page_ids
        if not told["has_more"]:
            break
        after = told["last_id"]
    assert seen == ids and told["unreadable"] == []
    told = (await admin.get("/v1/keys", params={"tenant": "t3"})).json()
    assert [one["tenant"] for one in told["data"]] == ["t3"]
    none = (await admin.get("/v1/keys", params={"tenant": "nobody"})).json()
    assert (none["data"], none["first_id"], none["last_id"]) == ([], None, None)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("limit=%C2%B2", "limit"),
     ("after=0011", "after"), ("order=desc", "order")],
)  # fmt: skip
async def test_a_wrong_parameter_is_named(admin, query, param):
    answer = await admin.get(f"/v1/keys?{query}")
    assert error_of(answer) == (400, None, param)


KEYS = [create_key(str(number), created=NOON)[0] for number in range(12)]


@given(st.integers(0, 12), st.integers(1, 13))
def test_pages_are_all_keys_once_and_in_order(number, limit):
    keys, seen, after = KEYS[:number], [], None
    while True:
        part, more = page(keys, limit, after)
        assert len(part) == limit or not more
        seen += part
        if not more:
            break
        after = part[-1].key_id
    assert seen == keys
    with pytest.raises(InvalidRequest):
        page(keys, limit, "unknown")


async def test_unreadable_rows_are_named_and_can_be_revoked(admin, client, store, engine):
    client("acme")
    [key] = [key for key in store.all() if key.tenant == "acme"]
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE api_keys SET addresses = 'x' WHERE tenant = 'acme'")
    path = f"/v1/keys/{key.key_id}"
    [bad] = (await admin.get("/v1/keys")).json()["unreadable"]
    assert bad["id"] == key.key_id and "network" in bad["error"]
    assert (await admin.get(path)).status_code == 404
    assert (await admin.post(path, json={"rpm": 1})).status_code == 404
    assert (await admin.delete(path)).status_code == 200


async def test_every_change_is_logged_without_the_secret(admin, store, caplog):
    caplog.set_level(logging.INFO, "ray.serve")
    [own] = store.all()
    made = (await admin.post("/v1/keys", json={"tenant": "acme", "rpm": 7})).json()
    path = f"/v1/keys/{made['id']}"
    await admin.post(path, json={"rpm": 8})
    await admin.post(path, json={"rpm": 0})
    await admin.delete(path)
    await admin.delete(path)
    lines = [each.getMessage() for each in caplog.records if made["id"] in each.getMessage()]
    assert [line.split(" by admin key ")[0].split()[-1] for line in lines] == [
        "created",
        "changed",
        "revoked",
    ]
    assert all(f"admin key {own.key_id}" in line for line in lines)
    assert "'rpm': 7" in lines[0] and "'rpm': 8" in lines[1]
    assert made["value"].split("-")[2] not in caplog.text


async def test_a_change_is_logged_and_made_though_its_client_leaves(
    admin, store, services, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "ray.serve")
    go, began, add = threading.Event(), threading.Event(), store.add

    def slowly(key):
        began.set()
        assert go.wait(10)
        add(key)

    await admin.get("/v1/keys")
    monkeypatch.setattr(store, "add", slowly)
    asking = asyncio.create_task(admin.post("/v1/keys", json={"tenant": "acme"}))
    await asyncio.to_thread(began.wait, 10)
    # The event loop and other keys go on meanwhile.
    assert (await admin.get("/v1/me")).status_code == 200
    asking.cancel()
    await asyncio.wait([asking])
    go.set()
    await asyncio.to_thread(services.key_admin.close)
    assert [key.tenant for key in store.all()] == ["ops", "acme"]
    assert "of tenant acme created by admin key" in caplog.text


async def test_only_so_many_wait_at_once(admin, store, monkeypatch):
    monkeypatch.setattr(key_admin, "MOST", 2)
    go, listing = threading.Event(), store.listing

    def slowly():
        assert go.wait(10)
        return listing()

    await admin.get("/v1/keys")
    monkeypatch.setattr(store, "listing", slowly)
    waiting = [asyncio.create_task(admin.get("/v1/keys")) for _ in range(2)]
    await asyncio.sleep(0.05)
    answer = await admin.get("/v1/keys")
    assert error_of(answer) == (429, "rate_limit_exceeded", None)
    assert answer.headers["retry-after"] == "1"
    go.set()
    assert [each.status_code for each in await asyncio.gather(*waiting)] == [200, 200]
    assert (await admin.get("/v1/keys")).status_code == 200


async def test_a_database_that_is_away_is_said_so(admin, engine):
    await admin.get("/v1/keys")
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE api_keys RENAME TO gone")
    for answer in (
        await admin.get("/v1/keys"),
        await admin.post("/v1/keys", json={"tenant": "acme"}),
        await admin.delete("/v1/keys/0011"),
    ):
        assert error_of(answer) == (503, "keys_unavailable", None)
        assert "api_keys" not in answer.text


async def test_an_id_that_is_none_is_not_looked_for(admin):
    for path in ("/v1/keys/a%00b", "/v1/keys/%C3%A9", "/v1/keys/a-b"):
        assert error_of(await admin.get(path)) == (404, "key_not_found", None)
