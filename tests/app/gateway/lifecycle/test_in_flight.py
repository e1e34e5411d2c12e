"""How many requests of a key may be in flight, through a whole ingress."""

import asyncio
import json

import pytest

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.core.dialect import Route
from app.tenants.concurrency import Holder
from deployments.simulator.settings import InjectedFailures
from tests.support.waiting import until
from tests.support.world import MODEL, QUEUE, Seen, World

pytestmark = pytest.mark.unit

FIELDS = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
BOUND = 3


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    made.services.settings = IngressSettings(
        auth="keys", engine_timeout_s=0.25, stream_timeout_s=0.25, max_concurrent_per_key=BOUND
    )
    await made.start()
    await made.set(ModelSettings(queue=QUEUE), ["vllm"])
    yield made
    await made.close()


def ask(world, plan=(), tenant="plain", **fields):
    seen = Seen(None, list(plan))
    return seen, asyncio.create_task(world.ask(seen, Route.CHAT, FIELDS | fields, tenant))


def in_flight(world):
    return world.services.access.in_flight


async def test_one_more_than_the_bound_is_refused_and_recorded(world):
    """568732b: all were let in."""
    hanging = [ask(world, [InjectedFailures(request="hang")] * 2) for _ in range(BOUND)]
    await until(lambda: in_flight(world).of(Holder.TENANT, "plain") == BOUND)
    refused, asking = ask(world)
    await asking
    error = json.loads(refused.body)["error"]
    assert (refused.status, error["type"]) == (429, "requests")
    assert error["code"] == "concurrency_limit_exceeded" and "Limit 3" in error["message"]
    assert int(refused.headers["retry-after"]) >= 1
    other, asking = ask(world, tenant="premium")
    await asyncio.wait([asking])
    assert other.status != 429 or b"concurrency" not in other.body
    for _, hangs in hanging:
        hangs.cancel()
    await asyncio.wait([hangs for _, hangs in hanging])
    assert len(in_flight(world)) == 0
    again, asking = ask(world)
    await asking
    assert again.status == 200
    records = await world.new_records()
    record = records[refused.request_id]
    assert (record["state"], record["reason"]) == ("refused", "concurrency_limit_exceeded")


OUTCOMES = {
    "answered": ({}, []),
    "streamed": ({"stream": True}, []),
    "refused by the engine": ({}, [InjectedFailures(request="error", status=400)]),
    "failed by the engine": ({}, [InjectedFailures(request="error", status=500)] * 2),
    "hanging": ({}, [InjectedFailures(request="hang")] * 2),
    "broken off": ({"stream": True}, [InjectedFailures(request="truncate", after_tokens=2)]),
    "no such tier": ({"service_tier": "none"}, []),
    "no such model": ({"model": "none"}, []),
    "no such key": ({}, []),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_every_way_out_gives_the_place_back(world, outcome):
    fields, plan = OUTCOMES[outcome]
    tenant = "nobody" if outcome == "no such key" else "plain"
    for _ in range(BOUND + 1):
        seen, asking = ask(world, plan, tenant, **fields)
        await asyncio.wait([asking])
        assert b"concurrency" not in seen.body
    assert len(in_flight(world)) == 0


async def test_those_who_are_turned_away_or_leave_give_their_places_back(world):
    # Two have the slots, one waits: it leaves, and one that does not wait is shed.
    asked = [ask(world, [InjectedFailures(request="hang")] * 2) for _ in range(BOUND)]
    await until(lambda: in_flight(world).of(Holder.TENANT, "plain") == BOUND)
    asked[-1][1].cancel()
    await until(lambda: in_flight(world).of(Holder.TENANT, "plain") < BOUND)
    shed, asking = ask(world, fail_fast=True)
    await asyncio.wait([asking, *(one for _, one in asked)])
    assert shed.status in (429, 503) and b"concurrency" not in shed.body
    assert len(in_flight(world)) == 0
