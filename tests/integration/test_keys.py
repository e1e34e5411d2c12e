"""API keys: who may, at which tiers, how much; and what each tenant sees of it."""

import asyncio
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from decimal import Decimal

import httpx
import openai
import pytest
from typer.testing import CliRunner

from app.cli.main import main
from tests.support.cluster import (
    eventually,
    eventually_async,
    ingress_app,
    ingress_processes,
    ledger_url,
    running_ingresses,
    simulated_app,
)
from tests.support.waiting import PATIENCE_S, SLOWEST

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "hello"}]


def command(*words):
    result = CliRunner().invoke(main, [*words, "--ledger", ledger_url()])
    assert result.exit_code == 0, result.output
    return result.output


def create(tenant, *options):
    text = command("keys", "create", "--tenant", tenant, *options)
    return next(word for word in text.split() if word.startswith("fl-"))


@pytest.fixture(scope="module")
def guarded(frontline):
    """An ingress that asks for keys."""
    frontline.deploy(ingress_app(auth="keys"), simulated_app("kept"))
    eventually(
        lambda: httpx.get(f"{frontline.root}/v1/models", timeout=PATIENCE_S).status_code == 401, 40
    )
    text = create("setup")
    with client(frontline, text) as one:
        eventually(lambda: served(one), 60)
    yield frontline
    frontline.restore_ingress()
    eventually(
        lambda: httpx.get(f"{frontline.root}/v1/models", timeout=PATIENCE_S).status_code == 200, 40
    )
    frontline.remove("kept")


def client(frontline, key):
    return openai.OpenAI(
        base_url=frontline.base_url, api_key=key, max_retries=0, timeout=PATIENCE_S
    )


def served(one, **request):
    try:
        return ask(one, **request)
    except (openai.NotFoundError, openai.InternalServerError, openai.RateLimitError):
        return None


def ask(one, **request):
    asked = {"model": "kept", "messages": MESSAGES, "max_tokens": 4, **request}
    raw = one.chat.completions.with_raw_response.create(**asked)
    return raw.headers, raw.parse()


def test_without_a_key_that_works_there_is_nothing(guarded):
    for key in ("", "none", "fl-0123456789abcdef-" + 64 * "0"):
        with httpx.Client(base_url=guarded.root, timeout=PATIENCE_S) as http:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for method, path in [
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/kept"),
                ("GET", "/v1/usage"),
            ]:
                answer = http.request(method, path, headers=headers, json={"model": "kept"})
                assert answer.status_code == 401, path
                error = answer.json()["error"]
                assert error["code"] == "invalid_api_key"
                assert error["type"] == "invalid_request_error"
                assert not key or key not in answer.text
    assert httpx.get(f"{guarded.root}/health", timeout=PATIENCE_S).status_code == 200


def test_a_request_is_its_tenants(guarded):
    key = create("acme")
    with client(guarded, key) as one:
        _, answer = ask(one, service_tier="priority")
    [record] = eventually(lambda: guarded.records(tenant="acme"))
    assert record["request_id"] in answer.id
    assert record["key_id"] == key.split("-")[1]
    assert record["served_tier"] == "priority"


def test_a_key_has_a_default_tier_and_tiers_that_it_may_use(guarded):
    with client(guarded, create("frugal", "--default-tier", "flex", "--tiers", "flex")) as one:
        headers, answer = ask(one)
        assert answer.service_tier == "flex"
        headers, answer = ask(one, service_tier="priority")
        assert answer.service_tier == headers["x-service-tier"] == "default"
        assert headers["x-service-tier-reason"] == "key_may_not_use_tier"


@pytest.mark.parametrize(
    ("networks", "status"), [(["127.0.0.0/8", "::1"], 200), (["10.0.0.0/8"], 403)]
)
def test_a_key_is_used_from_its_addresses_alone(guarded, networks, status):
    """As HAProxy sees the client, whatever the client says of itself."""
    key = create("placed", *(word for one in networks for word in ("--allow-address", one)))
    claims = [
        {}, {"x-forwarded-for": "10.0.0.1"}, {"x-frontline-client": "x 10.0.0.1"},
        {"forwarded": "for=10.0.0.1"}, {"x-forwarded-for": "8.8.8.8"},
    ]  # fmt: skip
    asked = {"model": "kept", "messages": MESSAGES, "max_tokens": 1}
    with httpx.Client(base_url=guarded.root, timeout=PATIENCE_S) as http:
        for claim in claims:
            headers = {"authorization": f"Bearer {key}", **claim}
            answer = http.post("/v1/chat/completions", json=asked, headers=headers)
            assert answer.status_code == status, (claim, answer.text)
            assert status == 200 or answer.json()["error"]["code"] == "address_not_allowed"


def test_an_admin_key_makes_and_revokes_keys_over_http(guarded):
    admin = {"authorization": f"Bearer {create('ops', '--admin')}"}
    with httpx.Client(base_url=guarded.base_url, timeout=PATIENCE_S) as http:
        made = http.post("keys", json={"tenant": "over-http", "name": "first"}, headers=admin)
        assert made.status_code in (200, 201), made.text
        key, key_id = made.json()["value"], made.json()["id"]
        with client(guarded, key) as one:
            _, answer = ask(one)
            assert answer.choices
            with pytest.raises(openai.PermissionDeniedError):
                one.get("/keys", cast_to=object)
            listed = http.get("keys", params={"tenant": "over-http"}, headers=admin).json()["data"]
            assert [entry["id"] for entry in listed] == [key_id] and key not in str(listed)
            assert http.delete(f"keys/{key_id}", headers=admin).is_success
            eventually(lambda: refused(one), 60)


def refused(one):
    try:
        ask(one)
    except openai.AuthenticationError:
        return True
    return False


def test_above_its_priority_share_a_key_is_served_as_default(guarded):
    with client(guarded, create("sharing", "--priority-share", "0.2")) as one:
        answers = [ask(one, service_tier="priority") for _ in range(20)]
        tiers = Counter(answer.service_tier for _, answer in answers)
        reasons = {headers.get("x-service-tier-reason") for headers, _ in answers}
    assert tiers == {"priority": 4, "default": 16}
    assert reasons == {None, "over_priority_share"}
    records = eventually(lambda: len(guarded.records(tenant="sharing")) == 20) and guarded.records(
        tenant="sharing"
    )
    assert Counter(record["served_tier"] for record in records) == tiers


def test_a_limit_is_told_and_kept(guarded):
    with client(guarded, create("limited", "--rpm", "6")) as one:
        headers, _ = ask(one)
        assert headers["x-ratelimit-limit-requests"] == "6"
        assert headers["x-ratelimit-remaining-requests"] == "5"
        for _ in range(5):
            ask(one)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(one)
    error = caught.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(error.response.headers["retry-after"]) > 30
    eventually(lambda: guarded.records(tenant="limited", state="refused"))
    [refused] = guarded.records(tenant="limited", state="refused")
    assert (refused["served_tier"], Decimal(refused["cost"])) == (None, 0)


def test_a_revoked_key_stops_working_within_seconds(guarded):
    key = create("leaving")
    with client(guarded, key) as one:
        ask(one)
        command("keys", "revoke", key.split("-")[1])
        began = time.monotonic()

        def refused():
            try:
                ask(one)
            except openai.AuthenticationError:
                return True
            return False

        eventually(refused, 10)
        assert time.monotonic() - began < SLOWEST * 5


def test_a_tenant_sees_its_own_usage_to_the_last_digit(guarded):
    one_key, other_key = create("one"), create("other")
    with client(guarded, one_key) as one, client(guarded, other_key) as other:
        for tier in ("priority", "default", "flex", "default"):
            ask(one, service_tier=tier)
        ask(other)
    eventually(lambda: len(guarded.records(tenant="one")) == 4)
    cost = sum(Decimal(record["cost"]) for record in guarded.records(tenant="one"))
    headers = {"authorization": f"Bearer {one_key}"}
    with httpx.Client(base_url=guarded.root, headers=headers, timeout=PATIENCE_S) as http:
        usage = http.get("/v1/usage").json()
        by_key = http.get("/v1/usage", params={"group_by": "key"}).json()
        bad = http.get("/v1/usage", params={"group_by": "tenant"})
    assert Decimal(usage["total"]["cost"]) == cost > 0
    assert usage["total"]["requests"] == 4
    assert {(t["tier"], t["requests"]) for t in usage["data"]} == {
        ("priority", 1),
        ("default", 2),
        ("flex", 1),
    }
    assert [total["key"] for total in by_key["data"]] == [one_key.split("-")[1]]
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "group_by")


@asynccontextmanager
async def two_ingresses(guarded):
    """Have two ingresses in place of one."""
    await asyncio.to_thread(guarded.deploy, ingress_app(auth="keys", replicas=2))
    try:
        await eventually_async(lambda: running_ingresses() == 2, 60)
        await asyncio.sleep(2)  # HAProxy has heard of both
        yield
    finally:
        await asyncio.to_thread(guarded.deploy, ingress_app(auth="keys"))


def patient(guarded, key, retries=0):
    return openai.AsyncOpenAI(
        base_url=guarded.base_url, api_key=key, max_retries=retries, timeout=PATIENCE_S
    )


async def test_a_limit_holds_across_two_ingresses(guarded):
    async with two_ingresses(guarded):
        key = await asyncio.to_thread(create, "crowd", "--rpm", "60")
        async with patient(guarded, key) as one:

            async def admitted():
                try:
                    await one.chat.completions.create(model="kept", messages=MESSAGES, max_tokens=2)
                except openai.RateLimitError as error:
                    return error.code != "rate_limit_exceeded"
                return True

            answers, began = [], time.monotonic()
            for _ in range(10):
                answers += await asyncio.gather(*(admitted() for _ in range(10)))
            # On a busy machine the first ones may be a minute ago, and some more go.
            elapsed_s = time.monotonic() - began
    assert 57 <= sum(answers) <= (60 if elapsed_s < 60 else 120)


SPENDERS = 4
PAUSE_S = 0.4


async def test_a_budget_holds_across_two_ingresses_one_of_which_is_killed(guarded):
    """What is spent goes beyond it by what was in flight, and what ended a moment before."""
    with client(guarded, await asyncio.to_thread(create, "thrifty")) as one:
        _, answer = await asyncio.to_thread(ask, one)
    cost = Decimal(str(answer.usage.estimated_cost))
    budget = 40 * cost
    key = await asyncio.to_thread(create, "thrifty", "--budget", f"total={budget:f}")

    async def spend(one):
        """Ask until the budget is spent; return how often one was answered."""
        answers = 0
        while True:
            try:
                await asyncio.to_thread(ask, one)
                answers += 1
            except openai.RateLimitError as error:
                assert error.code == error.type == "insufficient_quota"
                return answers
            except (openai.APIConnectionError, openai.InternalServerError):
                pass  # its ingress was killed
            await asyncio.sleep(PAUSE_S)

    with client(guarded, key) as one:
        async with two_ingresses(guarded):
            spending = [asyncio.create_task(spend(one)) for _ in range(SPENDERS)]
            await asyncio.sleep(4 * PAUSE_S)
            random.choice(ingress_processes()).kill()
            answers = sum(await asyncio.gather(*spending))
            await eventually_async(lambda: running_ingresses() == 2, 60)
    key_id = key.split("-")[1]

    def ended():
        records = [r for r in guarded.records(key_id=key_id) if r["state"] != "open"]
        return sum(r["served_tier"] is not None for r in records) >= answers and records

    records = await eventually_async(ended, 40)
    spent = sum(Decimal(record["cost"]) for record in records)
    # In flight, and within the second before.
    late = SPENDERS + SPENDERS * (1 / PAUSE_S)
    assert budget <= spent <= budget + int(late) * cost
    before = len(records)
    async with patient(guarded, key, retries=2) as stubborn:
        with pytest.raises(openai.RateLimitError):
            await stubborn.chat.completions.create(model="kept", messages=MESSAGES)
    await eventually_async(lambda: len(guarded.records(key_id=key_id)) > before)
    await asyncio.sleep(2)  # the client retries within a second, if it does
    assert len(guarded.records(key_id=key_id)) == before + 1
