"""What is billed is what was echoed, whatever happens on the way, for any sequence of requests.

`scripts/test faults` tries two thousand sequences.
"""

import asyncio
import json
import os
from collections import Counter
from decimal import Context, Decimal, Inexact, localcontext

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, example, given, settings

from app import alarms
from app.core.dialect import Route
from app.core.tier_decision import RAISED, is_raised
from app.core.tiers import TIER_WORDS, TierReason
from tests.support.engine_scripts import (
    CRASH,
    DEARER,
    HANG,
    ONE_OF_TWO,
    Ask,
    Engines,
    Pause,
    Run,
    scripts,
)
from tests.support.world import ADAPTER, KEYS, MODEL, World

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"

pytestmark = [pytest.mark.faults if LONG else pytest.mark.unit, pytest.mark.timeout(1800)]

SEQUENCES = 2000 if LONG else 60
MAY = {name: set(more.get("tiers", ["priority", "flex"])) for name, more in KEYS.items()}
USUAL = {name: str(more.get("default_tier", "default")) for name, more in KEYS.items()}


# What must hold


EXACT = Context(prec=80, traps=[Inexact])
COSTLESS = {"shed", "refused"}
WITHIN_S = {"1ms": 0.001, 0.02: 0.02, "0h-0m-30s": 30}


def answered(seen):
    """The JSON objects of an answer, in order, and whether it came to its proper end."""
    text = seen.body.decode()
    if not seen.headers["content-type"].startswith("text/event-stream"):
        return ([json.loads(text, parse_float=Decimal)] if seen.whole else []), seen.whole
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    parts = [json.loads(one, parse_float=Decimal) for one in data if one != "[DONE]"]
    broke = any(
        ("error" in part and part.get("error")) or part.get("type") == "error" for part in parts
    )
    last = parts[-1].get("type", "") if parts else ""
    ends = ("response.completed", "response.incomplete", "message_stop")
    ended = "[DONE]" in data or last in ends
    return parts, ended and not broke


def check(world, seen, record):
    """Compare a request with its record, and return what became of it."""
    must, may = expected(seen)
    assert record is not None or not must, f"no record of {seen}"
    if record is None:
        return "no record"
    assert may, f"a record of {seen}"
    assert world.store.added[seen.request_id] == 1, "recorded more than once"
    ask = seen.request
    assert (record["tenant"], record["model"]) == (ask.tenant, ADAPTER if ask.adapter else MODEL)
    assert (record["route"], bool(record["stream"])) == (ask.route.value, ask.stream)
    check_cost(record)
    if record["state"] in COSTLESS:
        assert record["served_tier"] is None and Decimal(record["cost"]) == 0
        assert seen.headers.get("x-shed-reason", record["reason"]) == record["reason"]
        assert not seen.attempts
    else:
        check_price(world, seen, record)
        check_tier(world, seen, record)
    if seen.status == 200:
        check_answer(seen, record)
    elif seen.status:
        assert record["state"] in {"failed", *COSTLESS} and Decimal(record["cost"]) == 0
    return record["state"]


def expected(seen):
    """Whether a request must have a record, and whether it may."""
    if seen.attempts or seen.status == 200:
        return True, True
    if seen.left and not seen.status:
        # It waited for its turn or for a connection.
        return False, True
    if "x-service-tier-reason" in seen.headers and seen.status >= 400:
        return True, True
    if seen.status == 400 and b'"unsupported_endpoint"' in seen.body:
        return True, True
    named = bool(seen.request_id) and seen.status in (429, 500, 502, 503)
    return named, named


def check_cost(record):
    """Tokens x prices x multiplier, by an arithmetic that raises where it would round."""
    if record["served_tier"] is None:
        return
    fresh = record["prompt_tokens"] - record["cached_tokens"] - record["cache_write_tokens"]
    with localcontext(EXACT):
        at_default = (
            fresh * Decimal(record["input_price"])
            + record["cached_tokens"] * Decimal(record["cached_input_price"])
            + record["cache_write_tokens"] * Decimal(record["cache_write_price"])
            + record["completion_tokens"] * Decimal(record["output_price"])
        ) / 10**6 + record["images"] * Decimal(record["image_price"])
        assert Decimal(record["cost"]) == at_default * Decimal(record["multiplier"])


def check_price(world, seen, record):
    """The prices are those of the card that was in force when its tier was decided."""
    first, last = seen.began, seen.attempts[0].at if seen.attempts else seen.ended
    # Placed more than once: it went by a dead engine, or left before the second one heard it.
    moved = [one.replica_id for one in seen.attempts] != [record["replica"]] or any(
        died <= last and first <= known for died, known in world.crashes
    )
    if not moved:
        # It was decided after its only wait, and before the engine heard it.
        first += record["queue_s"] - 0.002
    in_force_then = [one.rate_card_of(seen.request.adapter) for one in in_force(world, first, last)]
    cards = {card.version: card for card in in_force_then}
    card = cards.get(record["rate_card"])
    assert card is not None, f"{record['rate_card']} is none of {list(cards)}"
    prices, long = card, card.long_context
    if long is not None and record["prompt_tokens"] > long.above:
        prices = long
    assert Decimal(record["input_price"]) == prices.input
    assert Decimal(record["cached_input_price"]) == prices.cached_input
    assert Decimal(record["output_price"]) == prices.output
    assert Decimal(record["cache_write_price"]) == prices.cache_write
    assert Decimal(record["image_price"]) == (card.image or 0)
    factors = card.multipliers
    factor = {"priority": factors.priority, "default": Decimal(1), "flex": factors.flex}
    assert Decimal(record["multiplier"]) == factor[record["served_tier"]]


def in_force(world, first, last):
    """The model's settings at any time from the first moment to the last."""
    earlier = [model for at, model in world.cards if at <= first]
    return earlier[-1:] + [model for at, model in world.cards if first < at <= last]


def check_tier(world, seen, record):
    """Priority is what was asked for, allowed, and delivered by the engine."""
    ask, served = seen.request, record["served_tier"]
    named = ask.tier and TIER_WORDS[ask.tier].tier
    assert record["requested_tier"] == named
    wanted = named or USUAL[ask.tenant]
    raised = is_raised(record["reason"])
    assert not raised or (ask.within is not None and wanted != "priority")
    # One that has failed is not billed, and its record has only the reason of that.
    failed = record["state"] == "failed" and served != wanted and ask.within is not None
    perhaps = raised or (failed and wanted != "priority")
    if perhaps:
        wanted = ask.within_tier or "default"
        assert not raised or record["queue_s"] >= WITHIN_S[ask.within]
        assert not raised or served == wanted or ", " in record["reason"]
    assert served in (wanted, "default")
    assert served == "default" or served in MAY[ask.tenant]
    assert served == wanted or record["reason"]
    if not perhaps and ask.tier and (missing := TIER_WORDS[ask.tier].reason):
        assert served == "default" and (seen.status != 200 or record["reason"])
        assert record["state"] != "completed" or record["reason"] == missing
    strict = all(one.tiers.strict for one in in_force(world, seen.began, seen.ended))
    if ask.require or (strict and named is not None):
        assert served == wanted and record["reason"] not in set(TierReason)
    if seen.attempts and seen.attempts[-1].replica_id == record["replica"]:
        dialect = world.engines[record["replica"].rsplit("-", 1)[0]].status.dialect
        honoured = ask.route in dialect.priority_routes
        in_queue = any(
            one.tiers.priority == "queue" for one in in_force(world, seen.began, seen.ended)
        )
        assert served != "priority" or honoured or in_queue
        value = dialect.priority_values[served] if honoured else None
        sent = seen.attempts[-1]
        header = sent.headers.get(dialect.priority_headers.get(ask.route, ""))
        given = sent.fields.get("priority")
        if ask.route is Route.MESSAGES:
            assert given is None
            given = header and int(header)
        assert given == value
        told = [sent.fields.get(name) for name in ("model", "lora_path")]
        name = ask.adapter or MODEL
        assert told == [name, (ask.adapter or None) if dialect.adapter_field else None]


def check_answer(seen, record):
    """The tier and the cost that the client was told are those of the record."""
    assert seen.headers["x-service-tier"] == record["served_tier"]
    parts, ended = answered(seen)
    told = [part.get("response", part) for part in parts]
    if seen.request.route is Route.MESSAGES:
        told = [part.get("message", part).get("usage") or {} for part in told]
        assert all("service_tier" in usage for usage in told if usage)
    tiers = {part["service_tier"] for part in told if "service_tier" in part}
    assert tiers <= {record["served_tier"]}
    if seen.request.route not in (Route.RESPONSES, Route.MESSAGES):
        assert all("service_tier" in part for part in parts if not part.get("error"))
    if not seen.left:
        assert seen.whole
        assert record["state"] == ("completed" if ended else "interrupted")
    elif ended:
        assert record["state"] == "completed"
    else:
        assert record["state"] in ("interrupted", "completed")
    if record["state"] == "completed":
        assert seen.headers.get("x-service-tier-reason") == record["reason"]
    usages = [part["usage"] for part in told if part.get("usage")]
    if seen.request.route is Route.MESSAGES:
        usages = [usage for usage in told if usage]
    if ended:
        assert usages, "a complete answer tells its cost"
        assert tokens(usages[-1]) == (record["prompt_tokens"], record["completion_tokens"])
        assert usages[-1]["estimated_cost"] == Decimal(record["cost"])
    elif usages:
        # More may have been generated than the client got. It may be cheaper all the same: some
        # engines tell only at the end how much of the prompt was cached.
        assert tokens(usages[-1])[1] <= record["completion_tokens"] <= seen.request.tokens


def tokens(usage):
    if "cache_read_input_tokens" in usage:
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, usage["output_tokens"]
    names = [("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")]
    return tuple(usage.get(one, usage.get(other)) for one, other in names)


# Trying it


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.fixture(scope="module")
def world(loop, tmp_path_factory):
    made = loop.run(make(tmp_path_factory.mktemp("world")))
    yield made
    loop.run(made.close())


async def make(folder):
    world = World(folder)
    await world.start()
    return world


class Tally:
    """What has become of all requests, and what all records cost."""

    def __init__(self):
        self.counts, self.cost = Counter(), Decimal(0)


@pytest.fixture(scope="module")
def tally(world):
    """Printed, and added up against the bill."""
    made = Tally()
    yield made
    requests, cost = world.total()
    print(f"\n{dict(made.counts)}; a bill of {requests} records, {cost} USD")
    assert cost == made.cost


def raises(*names):
    """A script in which others take the slots of some engines, and one waits behind them."""
    wishes = ({}, {"stream": True}, {"require": True}, {"goes_wrong": (CRASH,)})
    return [
        step
        for to in (None, "priority")
        for tier in ("flex", "default")
        for more in wishes
        for step in (
            Engines(frozenset(names)),
            (Ask("priority", tokens=25),) * 2 * len(names),
            (Ask(tier, tokens=25, within="1ms", within_tier=to, **more),),
            Pause(None),
        )
    ]


@settings(
    max_examples=SEQUENCES,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(script=scripts)
# Lost by an engine that honours priority, to one that does not, and dearer in between.
@example(script=[ONE_OF_TWO, Ask(goes_wrong=(HANG,), behind=True), Pause(0.03), DEARER])
@example(script=[ONE_OF_TWO, *[Ask(goes_wrong=(CRASH,))] * 2])
# Kept to its tier until only an engine is left that does not honour it.
@example(script=[ONE_OF_TWO, *[Ask(goes_wrong=(CRASH,), require=True)] * 2])
# Messages: on engines that have the route alone, whatever else is there.
@example(script=[(Ask(route=Route.MESSAGES), Ask(route=Route.MESSAGES, stream=True)) * 3])
@example(script=[Engines(frozenset({"tensorrt"})), Ask(route=Route.MESSAGES)])
# An adapter: on engines that have it, among others; lost by one of them; and where none has it.
@example(script=[(Ask(model=ADAPTER), Ask(model=ADAPTER, stream=True)) * 3])
@example(
    script=[Ask(model=ADAPTER, stream=stream, goes_wrong=(CRASH,)) for stream in (False, True)]
)
@example(script=[ONE_OF_TWO, Ask(model=ADAPTER, goes_wrong=(CRASH,)), Ask(model=ADAPTER)])
# Raised while others run: to default, to priority where that is delivered, and where it is not.
@example(script=raises("vllm"))
@example(script=raises("unordered"))
@example(script=raises("vllm", "unordered"))
# Dearer in the middle of a stream, and while others wait.
@example(script=[(Ask(tokens=25, stream=True),) * 12, Pause(0.005), DEARER, Pause(0.005), DEARER])
def test_what_is_billed_is_what_was_echoed(loop, world, tally, script):
    seen, records = loop.run(play(world, script))
    with localcontext(EXACT):
        tally.cost += sum(Decimal(record["cost"]) for record in records.values())
    for one in seen:
        tally.counts[check(world, one, records.pop(one.request_id, None))] += 1
        tally.counts["requests"] += 1
        tally.counts[f"on {one.request.route.value}"] += 1
        tally.counts["moved to another replica"] += len(one.attempts) > 1
        tally.counts["to an adapter"] += bool(one.request.adapter and one.attempts)
        tally.counts["left by their clients"] += one.left
        tally.counts["raised"] += RAISED in one.headers.get("x-service-tier-reason", "")
    assert not records, "records of no request"
    assert "billed otherwise than echoed" not in alarms.PROCESS.counts()


async def play(world, script):
    run = Run(world)
    await run.play(script)
    return run.seen, await world.new_records()
