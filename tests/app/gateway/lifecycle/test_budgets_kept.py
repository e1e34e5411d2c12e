"""Budgets, through a whole ingress and what it records."""

import asyncio
import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.core.pricing import TokenUsage
from app.store.database import StoreAway
from tests.support.records import completed
from tests.support.waiting import until
from tests.support.world import ALIAS, KEYS, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {
    "model": ALIAS,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 10,
}
CARD = {"rate_card": {"input": "0", "output": "1000"}}
"""A cent for ten tokens."""


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(KEYS, "thrifty", {"budgets": ["month=0.05"]})
    monkeypatch.setitem(KEYS, "warned", {"budgets": ["total=0.01:warn"]})
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings.load(CARD, "user_config"), ["vllm"])
    yield made
    await made.close()


async def asked(world, tenant="thrifty", route=Route.CHAT, **more):
    seen = Seen(None, [])
    await world.ask(seen, route, {**FIELDS, **more}, tenant)
    return seen


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_over_a_budget_are_refused_and_recorded(world, stream):
    """46d2f66: all of them were served."""
    seen = [await asked(world, stream=stream) for _ in range(8)]
    assert [one.status for one in seen] == [200] * 5 + [429] * 3
    error = json.loads(seen[-1].body)["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "insufficient_quota", "insufficient_quota", None,
    )  # fmt: skip
    assert error["message"].startswith(
        "You exceeded your current quota, please check your plan and billing details."
    )
    # The clients of OpenAI and Anthropic would try it again otherwise.
    assert seen[-1].headers["x-should-retry"] == "false"
    assert "retry-after" not in seen[-1].headers
    records = await world.new_records()
    assert sum(Decimal(one["cost"]) for one in records.values()) == Decimal("0.05")
    assert {one["ingress"] for one in records.values()} == {world.registry.ingress}
    refused = records[seen[-1].request_id]
    assert (refused["state"], refused["reason"]) == ("refused", "insufficient_quota")
    assert not seen[-1].attempts


async def test_on_messages_the_error_is_in_the_shape_of_anthropic(world):
    for _ in range(5):
        await asked(world)
    seen = await asked(world, route=Route.MESSAGES)
    error = json.loads(seen.body)
    assert (seen.status, error["type"]) == (429, "error")
    assert (error["error"]["type"], error["error"]["code"]) == (
        "rate_limit_error", "insufficient_quota",
    )  # fmt: skip


async def test_what_is_in_flight_at_once_is_all_that_is_spent_beyond(world):
    await asyncio.gather(*(asked(world) for _ in range(4)))
    # All of them come before any has ended.
    seen = await asyncio.gather(*(asked(world) for _ in range(3)))
    assert [one.status for one in seen] == [200] * 3
    assert (await asked(world)).status == 429
    assert sum(Decimal(one["cost"]) for one in (await world.new_records()).values()) == Decimal(
        "0.07"
    )


async def test_what_was_spent_before_the_start_counts(world):
    key_id = world.key("thrifty").split("-")[1]
    before = completed(
        tenant="thrifty", key_id=key_id, arrived=datetime.now(UTC), ingress="dead",
        usage=TokenUsage(10_000_000, 0, 0),
    )  # fmt: skip
    assert before.cost >= Decimal("0.05")
    await asyncio.to_thread(world.store.add, [before.to_json()])
    assert (await asked(world)).status == 429
    assert (await asked(world, "plain")).status == 200


async def test_a_key_that_is_only_warned_is_served(world):
    assert [(await asked(world, "warned")).status for _ in range(3)] == [200] * 3
    await until(lambda: world.budgets.alerts[100, False])


async def test_a_key_is_told_what_is_left(world):
    async with world.client("thrifty") as http:
        (before,) = (await http.get("/v1/me")).json()["budgets"]
        for _ in range(7):
            await asked(world)
        (after,) = (await http.get("/v1/me")).json()["budgets"]
    assert (before["spent"], before["left"]) == ("0", "0.05")
    assert (after["spent"], after["left"]) == ("0.05", "0")
    fixed = {"owner": "key", "period": "month", "mode": "hard", "limit": "0.05"}
    assert fixed.items() <= after.items()
    resets = datetime.fromtimestamp(after["resets"], UTC)
    assert (resets.day, resets.hour) == (1, 0) and resets > datetime.now(UTC)


async def test_what_is_not_known_is_not_told(world):
    def away(_):
        raise StoreAway("nobody there")

    world.budgets.read_from(away)
    async with world.client("thrifty") as http:
        (told,) = (await http.get("/v1/me")).json()["budgets"]
        assert (told["limit"], told["spent"], told["left"]) == ("0.05", None, None)
        refused = await asked(world)
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (
            503, "budget_unavailable",
        )  # fmt: skip
        health = (await http.get("/health")).json()
        assert (health["status"], health["reasons"]) == ("degraded", ["budgets_unread"])
    async with world.client("plain") as http:
        assert (await http.get("/v1/me")).json()["budgets"] == []
        assert (await asked(world, "plain")).status == 200
