"""Requests that have not started in time are raised, and billed at the tier that served them."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.tenants.keys import KeyLimits
from tests.support.engine_scripts import HANG
from tests.support.waiting import until
from tests.support.world import ALIAS, KEYS, MODEL, SLOTS, Seen, World

pytestmark = pytest.mark.unit

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
CARD = {"input": "1", "output": "100", "multipliers": {"priority": "3", "flex": "0.5"}}
FACTOR = {"priority": Decimal(3), "default": Decimal(1), "flex": Decimal("0.5")}
BUDGET = Decimal(1)


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(KEYS, "budgeted", {"budgets": [f"total={BUDGET}"]})
    monkeypatch.setitem(KEYS, "barred", {"tiers": [Tier.FLEX]})
    monkeypatch.setitem(KEYS, "half", {"limits": KeyLimits(priority_share=Decimal("0.5"))})
    made = World(tmp_path, timeout_s=30)
    await made.start()
    yield made
    await made.close()


@dataclass
class Sent:
    """A request that waits behind others, and what became of it."""

    seen: Seen
    task: asyncio.Task[None]


class Crowd:
    """Requests that take all slots until they are to end."""

    def __init__(self, world):
        self.world = world
        self.sent = []

    async def set(self, engines=("vllm",), tiers=(), queue=()):
        values = {
            "rate_card": CARD, "tiers": dict(tiers), "queue": {"headroom": 0, **dict(queue)},
        }  # fmt: skip
        await self.world.set(ModelSettings.load(values, "user_config"), engines)
        slots = SLOTS * len(engines)
        for _ in range(slots):
            self.send(plan=[HANG])
        await until(lambda: self.world.taken() == slots)

    def send(self, route=Route.CHAT, tenant="plain", headers=(), plan=(), **fields):
        prompt = {"input": "hello"} if route is Route.RESPONSES else CHAT
        seen = Seen(None, list(plan))
        body = {"model": ALIAS, **prompt, **fields}
        task = asyncio.create_task(self.world.ask(seen, route, body, tenant, headers))
        self.sent.append(task)
        return Sent(seen, task)

    def waiting(self):
        state = self.world.registry.find(MODEL).state()
        return {tier.value: count for tier, count in state.waiting.items() if count}


async def crowd(world, **more):
    made = Crowd(world)
    await made.set(**more)
    return made


async def served(made, sent):
    """Let the crowd go, and return what a request was answered and what was recorded of it."""
    busy = [task for task in made.sent if task is not sent.task]
    for task in busy:
        task.cancel()
    await asyncio.wait(made.sent)
    await sent.task
    return sent.seen, (await made.world.new_records())[sent.seen.request_id]


def check_bill(answered, tier, reason):
    seen, record = answered
    assert seen.status == 200, seen.body
    assert seen.headers["x-service-tier"] == record["served_tier"] == tier
    assert seen.headers.get("x-service-tier-reason") == record["reason"] == reason
    assert json.loads(seen.body)["service_tier"] == tier
    usage = TokenUsage(
        record["prompt_tokens"], record["cached_tokens"], record["completion_tokens"]
    )
    at_default = (usage.prompt_tokens * 1 + usage.completion_tokens * 100) * Decimal(1) / 10**6
    assert Decimal(record["cost"]) == at_default * FACTOR[tier] > 0
    told = json.loads(seen.body, parse_float=Decimal)["usage"]["estimated_cost"]
    assert told == Decimal(record["cost"])
    # The gateway's own fields, and what the engine is told instead.
    sent = seen.attempts[-1].fields
    assert {"start_within", "start_within_tier", "service_tier"}.isdisjoint(sent)
    return sent


RAISED = "start_within_passed"


@pytest.mark.parametrize("wanted", ["default", "priority"])
@pytest.mark.parametrize("header", [False, True])
async def test_it_is_raised_and_billed_at_the_tier_that_served_it(world, wanted, header):
    made = await crowd(world)
    fields = {} if header else {"start_within": "50ms"}
    headers = [(b"x-start-within", b"50ms")] if header else []
    sent = made.send(service_tier="flex", start_within_tier=wanted, headers=headers, **fields)
    await until(lambda: made.waiting() == {wanted: 1})
    seen, record = await served(made, sent)
    engines = check_bill((seen, record), wanted, RAISED)
    assert record["requested_tier"] == "flex"
    assert record["queue_s"] >= 0.04
    dialect = world.engines["vllm"].status.dialect
    assert engines["priority"] == dialect.priority_values[Tier(wanted)]


@pytest.mark.parametrize("tier", ["flex", "default", "priority"])
async def test_one_that_starts_in_time_is_served_as_requested(world, tier):
    made = await crowd(world)
    sent = made.send(service_tier=tier, start_within=60, start_within_tier="priority")
    await until(lambda: made.waiting() == {tier: 1})
    check_bill(await served(made, sent), tier, None)


async def test_a_priority_request_ignores_it(world):
    made = await crowd(world)
    sent = made.send(service_tier="priority", start_within=0.001)
    await until(lambda: made.waiting() == {"priority": 1})
    await asyncio.sleep(0.05)
    check_bill(await served(made, sent), "priority", None)


async def test_a_default_request_is_raised_to_priority_only_if_it_says_so(world):
    made = await crowd(world)
    sent = made.send(start_within=0.001)
    other = made.send(start_within=0.001, start_within_tier="priority")
    await until(lambda: made.waiting() == {"default": 1, "priority": 1})
    await served(made, other)
    assert other.seen.headers["x-service-tier-reason"] == RAISED
    assert other.seen.headers["x-service-tier"] == "priority"
    assert sent.task.cancelled()


CANNOT = [
    ("key_may_not_use_tier", {"tenant": "barred"}, {}),
    ("model_does_not_offer_tier", {}, {"tiers": {"priority": "off"}}),
    ("no_replica_honours_priority", {}, {"engines": ["unordered"]}),
    ("route_does_not_honour_priority", {"route": Route.RESPONSES}, {"engines": ["sglang"]}),
]


@pytest.mark.parametrize(("reason", "request_", "model"), CANNOT)
async def test_where_it_cannot_have_priority_it_becomes_default(world, reason, request_, model):
    made = await crowd(world, **model)
    asked = {"service_tier": "flex", "start_within": 0.02, "start_within_tier": "priority"}
    sent = made.send(**asked, **request_)
    insisting = made.send(**asked, **request_, require_tier=True)
    await until(lambda: made.waiting() == {"default": 1, "flex": 1})
    seen, record = await served(made, sent)
    assert insisting.task.cancelled()
    if "route" not in request_:
        check_bill((seen, record), "default", f"{RAISED}, {reason}")
    assert (record["served_tier"], record["reason"]) == ("default", f"{RAISED}, {reason}")


async def test_one_that_insists_is_served_where_it_stays(world):
    made = await crowd(world, engines=["unordered"])
    sent = made.send(
        service_tier="flex", start_within=0.02, start_within_tier="priority", require_tier=True
    )
    await until(lambda: made.waiting() == {"flex": 1})
    await asyncio.sleep(0.1)
    check_bill(await served(made, sent), "flex", None)


async def test_one_that_insists_may_be_raised_to_the_tier_that_it_names(world):
    made = await crowd(world, tiers={"strict": True})
    sent = made.send(service_tier="flex", start_within=0.02, require_tier=True)
    await until(lambda: made.waiting() == {"default": 1})
    check_bill(await served(made, sent), "default", RAISED)


async def test_the_share_of_priority_is_kept(world):
    """Of four that may become priority, the key's share admits two."""
    made = await crowd(world)
    for _ in range(4):
        made.send(
            tenant="half", service_tier="flex", start_within=0.02, start_within_tier="priority"
        )
    await until(lambda: sum(made.waiting().values()) == 4)
    await until(lambda: "flex" not in made.waiting())
    assert made.waiting()["priority"] <= 2
    for task in made.sent[:SLOTS]:
        task.cancel()
    await asyncio.wait(made.sent)
    records = (await world.new_records()).values()
    reasons = Counter(one["reason"] for one in records if one["tenant"] == "half")
    assert reasons[f"{RAISED}, over_priority_share"] >= 2
    assert sum(reasons.values()) == 4


async def test_a_budget_counts_the_price_of_the_tier_that_served(world):
    made = await crowd(world)
    sent = made.send(
        tenant="budgeted", service_tier="flex", start_within=0.02, start_within_tier="priority"
    )
    await until(lambda: made.waiting() == {"priority": 1})
    seen, record = await served(made, sent)
    check_bill((seen, record), "priority", RAISED)
    async with world.client("budgeted") as client:
        [budget] = (await client.get("/v1/me")).json()["budgets"]
    assert Decimal(budget["spent"]) == Decimal(record["cost"])


async def test_the_record_of_an_answer_that_was_cut_off_says_that_it_was_raised(world):
    made = await crowd(world)
    sent = made.send(service_tier="flex", start_within=0.02, stream=True, max_tokens=1500)
    await until(lambda: made.waiting() == {"default": 1})
    for task in made.sent[:SLOTS]:
        task.cancel()
    await until(lambda: sent.seen.pieces > 2)
    sent.task.cancel()
    await asyncio.wait([sent.task])
    record = (await world.new_records())[sent.seen.request_id]
    assert (record["state"], record["reason"]) == ("interrupted", f"{RAISED}, client_gone")
    assert (record["requested_tier"], record["served_tier"]) == ("flex", "default")


async def test_where_the_queue_is_full_it_stays_until_there_is_a_place(world):
    none = {"max_waiting": 0, "reserved": 1}
    made = await crowd(world, queue={"priority": none, "default": none, "flex": none})
    default = made.send()
    sent = made.send(service_tier="flex", start_within=0.02)
    await until(lambda: made.waiting() == {"default": 1, "flex": 1})
    await asyncio.sleep(0.1)
    assert made.waiting() == {"default": 1, "flex": 1}
    default.task.cancel()
    await until(lambda: made.waiting() == {"default": 1})
    check_bill(await served(made, sent), "default", RAISED)


WRONG = [0, -1, True, [], {}, "soon", "30", "0s", "25h", 1e9]


@pytest.mark.parametrize("route", [Route.CHAT, Route.RESPONSES, Route.MESSAGES])
@pytest.mark.parametrize(
    ("name", "fields", "headers"),
    [
        *(("start_within", {"start_within": value}, []) for value in WRONG),
        *(("start_within_tier", {"start_within_tier": value}, []) for value in ["flex", 1, [], ""]),
        *(("x-start-within", {}, [(b"x-start-within", text)]) for text in [b"", b"soon", b"\xff"]),
    ],
)
async def test_anything_else_is_refused_by_name(world, route, name, fields, headers):
    await world.set(ModelSettings.load({"rate_card": CARD}, "user_config"), ["vllm"])
    seen = Seen(None, [])
    await world.ask(seen, route, {"model": ALIAS, **CHAT, **fields}, "plain", headers)
    error = json.loads(seen.body)["error"]
    assert (seen.status, error["code"], error["param"]) == (400, "invalid_value", name)
    assert name in error["message"] and not seen.attempts


@pytest.mark.parametrize("field", ["30s", None])
async def test_the_field_goes_before_the_header(world, field):
    """A proxy may set the header for all; a request's own wish counts."""
    await world.set(ModelSettings.load({"rate_card": CARD}, "user_config"), ["vllm"])
    seen = Seen(None, [])
    fields = {"model": ALIAS, **CHAT, "start_within": field}
    await world.ask(seen, Route.CHAT, fields, "plain", [(b"x-start-within", b"soon")])
    assert seen.status == (400 if field is None else 200)
