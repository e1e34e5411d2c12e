"""What single requests cost, through a whole ingress and its database."""

import asyncio
from decimal import Decimal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import ModelSettings
from app.config.usage_reads import UsageSettings
from app.core.errors import InvalidRequest
from app.gateway.request_costs_route import MAX_IDS, parse_ids
from app.gateway.usage_reader import UsageReader
from tests.support.world import ALIAS, World

pytestmark = pytest.mark.unit

CHAT = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
COSTS = "/v1/request-costs"


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path, timeout_s=30)
    await made.start()
    card = {"rate_card": {"input": "0.1", "output": "0.7"}}
    await made.set(ModelSettings.load(card, "user_config"), ["vllm"])
    made.services.usage = UsageReader(made.store_url, UsageSettings())
    yield made
    made.services.usage.close()
    await made.close()


async def test_what_is_told_is_what_was_echoed_and_only_to_its_tenant(world):
    async with world.client("plain") as http, world.client("premium") as other:
        answers = [
            await http.post("/v1/chat/completions", json=CHAT | {"service_tier": tier})
            for tier in ("priority", "default", "flex")
        ]
        ids = [answer.headers["request-id"] for answer in answers]

        async def costs(of):
            return (await of.post(COSTS, json={"request_ids": [*ids, "none"]})).json()["data"]

        told = await costs(http)
        while not all(one["found"] for one in told[:3]):
            await asyncio.sleep(0.1)
            told = await costs(http)
        assert [one["request_id"] for one in told] == [*ids, "none"]
        for one, answer in zip(told[:3], answers, strict=True):
            body = orjson.loads(answer.content)
            assert one["service_tier"] == body["service_tier"]
            assert float(Decimal(one["cost"])) == body["usage"]["estimated_cost"] > 0
            assert one["usage"]["completion_tokens"] == body["usage"]["completion_tokens"] == 3
            assert (one["state"], one["requested_tier"]) == ("completed", body["service_tier"])
        assert told[3] == {"request_id": "none", "found": False, "cost": None}
        assert not any(one["found"] for one in await costs(other))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "request_ids"),
        ({"request_ids": []}, "request_ids"),
        ({"request_ids": "a"}, "request_ids"),
        ({"request_ids": [1]}, "request_ids"),
        ({"request_ids": [""]}, "request_ids"),
        ({"request_ids": ["a\0"]}, "request_ids"),
        ({"request_ids": ["a" * 301]}, "request_ids"),
        ({"request_ids": ["a"] * (MAX_IDS + 1)}, "request_ids"),
        ({"request_ids": ["a"], "more": 1}, "more"),
        ([], None),
    ],
)
async def test_bad_input_is_refused_by_name(world, fields, param):
    async with world.client("plain") as http:
        answer = await http.post(COSTS, json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_body_that_is_too_long_or_no_json_is_refused(world):
    async with world.client("plain") as http:
        long = await http.post(COSTS, json={"request_ids": ["a" * 300] * 1000})
        assert (long.status_code, long.json()["error"]["code"]) == (413, "request_too_large")
        plain = await http.post(COSTS, content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        assert (await http.get(COSTS)).status_code == 405


@given(st.binary(max_size=50))
def test_any_body_is_parsed_or_refused(body):
    try:
        assert all(parse_ids(body))
    except InvalidRequest as error:
        assert error.message
