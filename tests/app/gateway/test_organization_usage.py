"""OpenAI's usage API over the ledger's records: over HTTP, and with OpenAI's own client."""

import asyncio
import contextlib
import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.config.ingress import IngressSettings
from app.config.usage_reads import UsageSettings
from app.core.pricing import RateCard, TokenUsage
from app.core.tiers import Tier
from app.gateway.asgi import build_api
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.gateway.usage_reader import UsageReader
from app.ledger.record_store import RecordStore, TooManyRows
from app.ledger.time_buckets import cursor_of
from app.store.database import StoreAway, StoreTooSlow, migrate
from app.store.schema import usage_records
from app.tenants.access import Access
from app.tenants.keys import KeyTable, create_key
from deployments.simulator.__main__ import Server
from tests.support.records import CARD, NOON, cards, completed, shed
from tests.support.world import Books

pytestmark = pytest.mark.unit

COMPLETIONS = "/v1/organization/usage/completions"
EMBEDDINGS = "/v1/organization/usage/embeddings"
TRANSCRIPTIONS = "/v1/organization/usage/audio_transcriptions"
COSTS = "/v1/organization/costs"
SECONDS = {"1m": 60, "1h": 3600, "1d": 86_400}
MOST = {"1m": 1440, "1h": 168, "1d": 31}


class Keys:
    """An admin key and the keys of two tenants."""

    def __init__(self):
        made = {
            name: create_key(name, created=datetime.now(UTC), admin=name == "admin")
            for name in ("admin", "a", "b")
        }
        self.headers = {
            name: {"authorization": f"Bearer {text}"} for name, (_, text) in made.items()
        }
        self._table = KeyTable.of(key for key, _ in made.values())

    def table(self):
        return self._table


KEYS = Keys()


@contextlib.asynccontextmanager
async def ingress(usage, *, keys=True):
    services = Services(ModelRegistry(None, discover_s=1), None, IngressSettings())
    services.usage = usage
    access = Access("i", KEYS, Books())
    access.start()
    services.access = access if keys else None
    services.ready.set()
    yield build_api(services)
    await access.stop()


@contextlib.asynccontextmanager
async def client(usage, who="admin", **more):
    async with ingress(usage, **more) as api:
        transport = httpx.ASGITransport(api)
        headers = KEYS.headers[who]
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers
        ) as http:
            yield http


@pytest.fixture
def store(engine):
    migrate(engine)
    return RecordStore(engine)


@pytest.fixture
def reader(url, store):
    reader = UsageReader(url, UsageSettings())
    yield reader
    reader.close()


def unix(moment):
    return int(moment.timestamp())


async def pages(http, path, **query):
    """Return all buckets, from page to page, with amounts as decimals."""
    found, page = [], None
    while True:
        answer = await http.get(path, params=query | ({} if page is None else {"page": page}))
        assert answer.status_code == 200, answer.text
        body = json.loads(answer.content, parse_float=Decimal)
        assert body["object"] == "page" and body["has_more"] == (body["next_page"] is not None)
        found += body["data"]
        page = body["next_page"]
        if page is None:
            return found


def record_of(route, usage, **more):
    """Embeddings generate nothing, and have no cached tokens to tell."""
    if route == "embeddings":
        usage = TokenUsage(usage.prompt_tokens, 0, 0)
    return completed(usage=usage, route=route, **more)


RECORDS = st.lists(
    st.builds(
        record_of,
        usage=st.builds(
            lambda prompt, cached, answer: TokenUsage(prompt, min(prompt, cached), answer),
            st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6),
        ),
        tenant=st.sampled_from(["a", "b"]),
        key_id=st.sampled_from(["k1", "k2"]),
        model=st.sampled_from(["m", "n, with a comma"]),
        route=st.sampled_from(["chat/completions", "messages", "responses", "embeddings"]),
        served=st.sampled_from(Tier),
        card=st.just(CARD) | cards,
        arrived=st.integers(-3 * 10**9, 3 * 10**9).map(
            lambda at: NOON + timedelta(microseconds=at)
        ) | st.sampled_from([-86_400, -43_200, -3600, -60, 0, 60, 43_199, 43_200]).map(
            lambda at: NOON + timedelta(seconds=at)
        ),
    ),
    max_size=10,
)  # fmt: skip


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None
)
@given(RECORDS, st.sampled_from(list(SECONDS)), st.integers(-4000, 4000))
def test_its_numbers_are_those_of_the_ledger(store, engine, reader, written, width, shift):
    with engine.begin() as connection:
        connection.execute(usage_records.delete())
    store.add([record.to_json() for record in [*written, shed()]])
    start, end = unix(NOON) - 3000 + shift, unix(NOON) + 3001 + shift
    asyncio.run(compare(reader, written, width, start, end))


async def compare(reader, written, width, start, end):
    async with client(reader) as http:
        await compare_with_records(http, written, width, start, end)
        await compare_with_usage(http, width)


async def compare_with_records(http, written, width, start, end):
    """For any period: what is added up here in another way."""
    expected = defaultdict(lambda: [0, 0, 0, 0])
    for record in written:
        of, at = record.origin, record.origin.arrived.timestamp()
        if of.route != "embeddings" and start <= at < end:
            border = int(at) - int(at) % SECONDS[width]
            sums = expected[max(start, border), of.tenant, of.key_id, of.model, record.served.value]
            usage = record.usage
            for place, number in enumerate(
                (1, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
            ):
                sums[place] += number
    names = ["project_id", "api_key_id", "model", "service_tier"]
    query = {"start_time": start, "end_time": end, "bucket_width": width, "group_by": names}
    buckets = await pages(http, COMPLETIONS, **query)
    borders = [bucket["start_time"] for bucket in buckets] + [buckets[-1]["end_time"]]
    assert (borders[0], borders[-1]) == (start, end)
    assert [bucket["end_time"] for bucket in buckets] == borders[1:]
    assert all(border % SECONDS[width] == 0 for border in borders[1:-1])
    counts = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")
    assert {
        (bucket["start_time"], *(result[name] for name in names)): [result[one] for one in counts]
        for bucket in buckets
        for result in bucket["results"]
    } == expected


async def compare_with_usage(http, width):
    """For whole days: what ``GET /v1/usage`` tells each tenant."""
    day = NOON.replace(hour=0)
    days = {"start": str((day - timedelta(2)).date()), "end": str((day + timedelta(2)).date())}
    period = {"start_time": unix(day - timedelta(2)), "end_time": unix(day + timedelta(2))}
    wide = {"bucket_width": width, "limit": MOST[width]}
    for tenant in ("a", "b"):
        of = period | {"project_ids[]": tenant}
        usage = await pages(http, COMPLETIONS, **of, **wide)
        usage += await pages(http, EMBEDDINGS, **of, **wide)
        costs = await pages(http, COSTS, **of)
        items = await pages(http, COSTS, **of, group_by="line_item")
        answer = await http.get("/v1/usage", params=days, headers=KEYS.headers[tenant])
        told = answer.json()["total"]
        results = [result for bucket in usage for result in bucket["results"]]
        for ours, openais in (
            ("requests", "num_model_requests"), ("prompt_tokens", "input_tokens"),
            ("cached_tokens", "input_cached_tokens"), ("completion_tokens", "output_tokens"),
        ):  # fmt: skip
            assert sum(result.get(openais, 0) for result in results) == told[ours]
        amounts = [result["amount"] for bucket in costs for result in bucket["results"]]
        assert all(amount["currency"] == "usd" for amount in amounts)
        assert sum(Fraction(amount["value"]) for amount in amounts) == Fraction(told["cost"])
        for bucket, whole in zip(items, costs, strict=True):
            parts = [Fraction(item["amount"]["value"]) for item in bucket["results"]]
            assert sum(parts) == sum(
                Fraction(result["amount"]["value"]) for result in whole["results"]
            )
        quantities = [item["quantity"] for bucket in items for item in bucket["results"]]
        assert sum(quantities) == told["prompt_tokens"] + told["completion_tokens"]


async def test_empty_buckets_are_there_and_what_was_turned_away_is_not(store, reader):
    store.add([completed().to_json(), shed().to_json()])
    query = {"start_time": unix(NOON) - 7200, "end_time": unix(NOON) + 7200, "bucket_width": "1h"}
    async with client(reader) as http:
        body = (await http.get(COMPLETIONS, params=query)).json()
    assert (body["has_more"], body["next_page"]) == (False, None)
    empty, result = [], {
        "object": "organization.usage.completions.result",
        "input_tokens": 1000, "output_tokens": 250, "input_cached_tokens": 400,
        "input_cache_write_tokens": 0, "num_model_requests": 1, "project_id": None,
        "user_id": None, "api_key_id": None, "model": None, "batch": None,
        "service_tier": None, "api_source": None,
    }  # fmt: skip
    assert [bucket["results"] for bucket in body["data"]] == [empty, empty, [result], empty]


async def test_recordings_have_usage_of_their_own_in_seconds(store, reader):
    card = RateCard.load({"input": 2, "output": 4, "image": "0.5", "audio_second": "0.25"}, "x")
    spoken = {"card": card, "served": Tier.DEFAULT, "route": "audio/transcriptions"}
    written = [
        completed(usage=TokenUsage(0, 0, 0, audio_seconds=7), **spoken),
        completed(usage=TokenUsage(0, 0, 0, audio_seconds=3), **spoken),
        completed(usage=TokenUsage(9, 0, 0, 4, 2), **spoken | {"route": "chat/completions"}),
    ]
    store.add([record.to_json() for record in written])
    query = {"start_time": unix(NOON), "end_time": unix(NOON) + 60}
    async with client(reader) as http:
        [spoken_bucket] = await pages(http, TRANSCRIPTIONS, **query)
        [embedded] = await pages(http, EMBEDDINGS, **query)
        [items] = await pages(http, COSTS, **query, group_by=["line_item"])
    [result] = spoken_bucket["results"]
    assert (result["seconds"], result["num_model_requests"]) == (10, 2)
    assert result["object"] == "organization.usage.audio_transcriptions.result"
    assert embedded["results"] == []
    assert [
        (one["line_item"], one["quantity"], one["quantity_unit"], one["amount"]["value"])
        for one in items["results"]
    ] == [
        ("m, audio_seconds", 10, "duration_seconds", Decimal("2.5")),
        ("m, cache_write_input_tokens", 4, "tokens", Decimal("0.000008")),
        ("m, images", 2, "images", 1),
        ("m, input_tokens", 5, "tokens", Decimal("0.00001")),
    ]


async def test_costs_are_split_into_line_items(store, reader):
    dear = RateCard.load({"input": 2, "cached_input": 1, "output": 4}, "x")
    written = [
        completed(model="m", card=dear, served=Tier.DEFAULT),
        completed(model="m", card=dear, served=Tier.FLEX),
        completed(model="m", card=dear, served=Tier.FLEX, tenant="b"),
        completed(model="n", card=dear, served=Tier.DEFAULT, usage=TokenUsage(5, 5, 0)),
    ]
    store.add([record.to_json() for record in [*written, shed()]])
    day = {"start_time": unix(NOON), "end_time": unix(NOON) + 60}
    async with client(reader) as http:
        [bucket] = await pages(http, COSTS, **day, group_by=["line_item", "project_id"])
        [plain] = await pages(http, COSTS, **day)
    # 600 of 1,000 tokens of the prompt are not cached; flex costs 0.8.
    assert [
        (one["project_id"], one["line_item"], one["quantity"], Fraction(one["amount"]["value"]))
        for one in bucket["results"]
    ] == [
        ("acme", "m, cached_input_tokens", 800, Fraction(400 * 18, 10**7)),
        ("acme", "m, input_tokens", 1200, Fraction(600 * 36, 10**7)),
        ("acme", "m, output_tokens", 500, Fraction(250 * 72, 10**7)),
        ("acme", "n, cached_input_tokens", 5, Fraction(5, 10**6)),
        ("b", "m, cached_input_tokens", 400, Fraction(400 * 8, 10**7)),
        ("b", "m, input_tokens", 600, Fraction(600 * 16, 10**7)),
        ("b", "m, output_tokens", 250, Fraction(250 * 32, 10**7)),
    ]
    assert {one["quantity_unit"] for one in bucket["results"]} == {"tokens"}
    [result] = plain["results"]
    assert (result["line_item"], result["quantity"]) == (None, None)


async def test_by_default_it_is_seven_days_from_the_start_and_until_now(store, reader):
    now = datetime.now(UTC).timestamp()
    async with client(reader) as http:
        old = (await http.get(COMPLETIONS, params={"start_time": 86_400 * 50 + 1})).json()
        assert len(old["data"]) == 7 and old["has_more"]
        assert (old["data"][0]["start_time"], old["data"][-1]["end_time"]) == (
            86_400 * 50 + 1, 86_400 * 57
        )  # fmt: skip
        for path, width in ((COMPLETIONS, "1m"), (EMBEDDINGS, "1h"), (COSTS, "1d")):
            query = {"start_time": int(now) - 90, "bucket_width": width}
            body = (await http.get(path, params=query)).json()
            assert not body["has_more"]
            assert 0 <= body["data"][-1]["end_time"] - int(now) < 60
        later = (await http.get(COMPLETIONS, params={"start_time": int(now) + 900})).json()
        assert (later["data"], later["has_more"]) == ([], False)


async def test_filters_and_groupings_that_are_one_group_here(store, reader):
    written = [
        completed(tenant=tenant, key_id=key, model=model)
        for tenant in ("a", "b", "c") for key in ("k1", "k2") for model in ("m", "n")
    ]  # fmt: skip
    store.add([record.to_json() for record in written])
    day = {"start_time": unix(NOON), "end_time": unix(NOON) + 60}
    async with client(reader) as http:

        async def requests(**query):
            [bucket] = await pages(http, COMPLETIONS, **day, **query)
            return sum(result["num_model_requests"] for result in bucket["results"])

        assert await requests() == 12
        assert await requests(project_ids=["a", "b"]) == 8
        assert await requests(**{"project_ids[]": ["a", "b"], "api_key_ids[]": ["k2"]}) == 4
        assert await requests(models=["m", "none"], api_key_ids=["k1"]) == 3
        assert await requests(batch="false") == 12
        assert await requests(batch="true") == 0
        query = day | {"group_by": "user_id,batch,api_source"}
        [bucket] = await pages(http, COMPLETIONS, **query)
        [result] = bucket["results"]
        assert (result["user_id"], result["batch"], result["api_source"]) == (
            None, False, "unlabeled"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        (COMPLETIONS, {}, "start_time"),
        (COSTS, {}, "start_time"),
        (COMPLETIONS, {"start_time": "yesterday"}, "start_time"),
        (COMPLETIONS, {"start_time": "-1"}, "start_time"),
        (COMPLETIONS, {"start_time": "9" * 5000}, "start_time"),
        (COMPLETIONS, {"start_time": ["1", "2"]}, "start_time"),
        (COMPLETIONS, {"start_time": 9, "end_time": 9}, "end_time"),
        (COMPLETIONS, {"start_time": 9, "end_time": "253402300800"}, "end_time"),
        (COMPLETIONS, {"start_time": 9, "bucket_width": "2d"}, "bucket_width"),
        (COSTS, {"start_time": 9, "bucket_width": "1h"}, "bucket_width"),
        (COMPLETIONS, {"start_time": 9, "group_by": ["model", "colour"]}, "group_by"),
        (COMPLETIONS, {"start_time": 9, "group_by[]": "tenant"}, "group_by"),
        (EMBEDDINGS, {"start_time": 9, "group_by": "service_tier"}, "group_by"),
        (COSTS, {"start_time": 9, "group_by": "model"}, "group_by"),
        (COMPLETIONS, {"start_time": 9, "group_by": "line_item"}, "group_by"),
        (COMPLETIONS, {"start_time": 9, "limit": 0}, "limit"),
        (COMPLETIONS, {"start_time": 9, "limit": 32}, "limit"),
        (COMPLETIONS, {"start_time": 9, "limit": 169, "bucket_width": "1h"}, "limit"),
        (COMPLETIONS, {"start_time": 9, "limit": 1441, "bucket_width": "1m"}, "limit"),
        (COSTS, {"start_time": 9, "limit": 181}, "limit"),
        (COMPLETIONS, {"start_time": 9, "batch": "no"}, "batch"),
        (EMBEDDINGS, {"start_time": 9, "batch": "true"}, "batch"),
        (COMPLETIONS, {"start_time": 9, "models": "a\0"}, "models"),
        (COMPLETIONS, {"start_time": 9, "api_key_ids": ""}, "api_key_ids"),
        (COMPLETIONS, {"start_time": 9, "project_ids[]": "a" * 301}, "project_ids"),
        (COMPLETIONS, {"start_time": 9, "user_ids": "u"}, "user_ids"),
        (COSTS, {"start_time": 9, "models": "m"}, "models"),
        (COMPLETIONS, {"start_time": 9, "page": "page_AA"}, "page"),
        (COMPLETIONS, {"start_time": 86_400, "page": cursor_of(86_400)}, "page"),
        (COMPLETIONS, {"start_time": 9, "page": cursor_of(86_401)}, "page"),
        (COMPLETIONS, {"start_time": 9, "end_time": 99, "page": cursor_of(86_400)}, "page"),
    ],
)
async def test_bad_parameters_are_refused_by_name(path, query, param):
    usage = SimpleNamespace(settings=UsageSettings())
    async with client(usage) as http:
        answer = await http.get(path, params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("path", [COMPLETIONS, EMBEDDINGS, COSTS])
async def test_it_is_for_admin_keys_alone(path):
    async def totals(wanted, groups):
        return []

    usage = SimpleNamespace(settings=UsageSettings(), totals=totals)
    query = {"start_time": 9}
    async with client(usage, "a") as http:
        answer = await http.get(path, params=query)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_required")
        # Nor does it tell others what is wrong with their queries.
        assert (await http.get(path)).status_code == 403
        answer = await http.get(path, params=query, headers={"authorization": "Bearer no"})
        assert answer.status_code == 401
    async with client(usage) as http:
        assert (await http.get(path, params=query)).status_code == 200
        assert (await http.get(path.replace("/v1", "/v1/openai"), params=query)).is_success
    async with client(usage, "a", keys=False) as http:
        assert (await http.get(path, params=query)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (TooManyRows(), 400, "usage_too_large", "limit"),
        (StoreTooSlow("SELECT secret"), 400, "usage_too_large", "limit"),
        (StoreAway("db.internal is away"), 503, "ledger_unavailable", None),
    ],
)
async def test_what_cannot_be_read_is_told_in_openais_shape(error, status, code, param):
    async def totals(wanted, groups):
        raise error

    usage = SimpleNamespace(settings=UsageSettings(), totals=totals)
    async with client(usage) as http:
        answer = await http.get(COMPLETIONS, params={"start_time": 9})
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["param"]) == (status, code, param)
    assert "secret" not in answer.text and "internal" not in answer.text


async def test_no_more_days_are_read_than_may_be():
    asked = []

    async def totals(wanted, groups):
        asked.append(wanted.arrived)
        return []

    usage = SimpleNamespace(settings=UsageSettings(max_days=5), totals=totals)
    async with client(usage) as http:
        for path in (COMPLETIONS, COSTS):
            assert (await http.get(path, params={"start_time": 0})).is_success
            answer = await http.get(path, params={"start_time": 0, "limit": 6})
            assert answer.json()["error"]["param"] == "limit"
    assert [end - start for start, end in asked] == [timedelta(days=5)] * 2


@contextlib.asynccontextmanager
async def served(api):
    config = uvicorn.Config(api, port=0, lifespan="off", log_config=None, access_log=False)
    server = Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    await task


async def test_openais_own_client_reads_it(store, reader):
    written = [completed(tenant="a", model="m"), completed(tenant="b", model="n")]
    store.add([record.to_json() for record in written])
    async with ingress(reader) as api, served(api) as url:
        key = KEYS.headers["admin"]["authorization"].removeprefix("Bearer ")
        async with openai.AsyncOpenAI(api_key="", admin_api_key=key, base_url=url) as sdk:
            usage = sdk.admin.organization.usage
            page: Any = await usage.completions(
                start_time=unix(NOON), end_time=unix(NOON) + 7201, bucket_width="1h", limit=1,
                group_by=["project_id", "model", "service_tier"], models=["m", "n"],
            )  # fmt: skip
            [bucket] = page.data
            assert [
                (one.project_id, one.model, one.service_tier, one.input_tokens, one.batch)
                for one in bucket.results
            ] == [("a", "m", "priority", 1000, None), ("b", "n", "priority", 1000, None)]
            assert page.has_more
            following: Any = await usage.completions(
                start_time=unix(NOON), end_time=unix(NOON) + 7201, bucket_width="1h",
                page=page.next_page,
            )  # fmt: skip
            assert [bucket.results for bucket in following.data] == [[], []]
            costs: Any = await usage.costs(
                start_time=unix(NOON), end_time=unix(NOON) + 60, group_by=["project_id"]
            )
            [bucket] = costs.data
            assert [(one.project_id, one.amount.value) for one in bucket.results] == [
                (record.origin.tenant, float(record.cost)) for record in written
            ]
            embeddings = await usage.embeddings(start_time=unix(NOON), end_time=unix(NOON) + 60)
            assert [bucket.results for bucket in embeddings.data] == [[]]
            spoken: Any = await usage.audio_transcriptions(
                start_time=unix(NOON), end_time=unix(NOON) + 60
            )
            assert [bucket.results for bucket in spoken.data] == [[]]
        key = KEYS.headers["a"]["authorization"].removeprefix("Bearer ")
        async with openai.AsyncOpenAI(api_key="", admin_api_key=key, base_url=url) as sdk:
            with pytest.raises(openai.PermissionDeniedError):
                await sdk.admin.organization.usage.completions(start_time=unix(NOON))
