"""Under load, ingresses and engines are killed; then every answer is looked for on the bill."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial

import pytest
from typer.testing import CliRunner

from app.cli.main import main
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually,
    eventually_async,
    ingress_app,
    ingress_processes,
    ledger_url,
    running_ingresses,
    simulated_app,
)

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
KILLS = 20 if LONG else 2
CLIENTS = 12
INGRESSES = REPLICAS = 2
TIERS = ["priority", "default", "flex"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@dataclass
class Seen:
    """What clients saw: the answers that they got to the end, by id, and how many broke."""

    answers: dict[str, dict] = field(default_factory=dict)
    failures: Counter = field(default_factory=Counter)


@pytest.fixture(scope="module")
def hammered(cluster):
    """Two ingresses and two engine replicas."""
    journal = {"adopt_interval_s": 1, "flush_interval_s": 0.25}
    journal |= {"folder": "${FRONTLINE_TEST_LEDGER}/journal"}
    cluster.deploy(
        ingress_app(replicas=INGRESSES, journal=journal),
        simulated_app("hammered", replicas=REPLICAS, tokens_per_second=200),
    )
    eventually(lambda: whole(cluster), 90)
    yield cluster
    cluster.remove("hammered")
    cluster.restore_ingress()


def whole(cluster, before=frozenset()):
    """Whether everything is there, and others than the ingresses and replicas ``before``."""
    if running_ingresses() != INGRESSES or not cluster.serves("hammered"):
        return False
    # Both ingresses know it, as the Model has heard of them: each finds new models by itself, and
    # HAProxy may have heard of one of them only.
    now = parts(cluster)
    return len(now) == INGRESSES + REPLICAS and now != before


def parts(cluster):
    """The ingresses and the engine replicas that the Model knows; the dead leave after a while."""
    board = cluster.board("hammered")
    ingresses = {one.demand.ingress for one in board.ingresses}
    return ingresses | {replica.replica_id for replica in board.snapshot.replicas}


async def ask(client, number, seen):
    """One request, unary or a stream; its answer counts once it has come to its end."""
    request = {
        "model": "hammered",
        "messages": [{"role": "user", "content": f"question {number}"}],
        "max_tokens": random.randint(1, 40),
        "service_tier": random.choice(TIERS),
    }
    if number % 2:
        raw = await client.chat.completions.with_raw_response.create(**request)
        answer = json.loads(raw.text, parse_float=Decimal)
    else:
        answer = await stream(client, request)
    seen.answers[answer["id"]] = answer


async def stream(client, request):
    last = None
    async with client.chat.completions.with_streaming_response.create(
        stream=True, **request
    ) as response:
        async for line in response.iter_lines():
            if line == "data: [DONE]":
                return last
            if line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "), parse_float=Decimal)
                if "error" in chunk:
                    raise ConnectionError("the stream broke off")
                last = chunk
    raise ConnectionError("the stream ended without its end")


def failure(error):
    """Name a failure; by its text as well where Serve has answered instead of an ingress."""
    text = getattr(error, "body", None)
    return f"{type(error).__name__} {text}" if isinstance(text, str) else type(error).__name__


@asynccontextmanager
async def load(cluster, seen):
    """Clients that ask without a pause until the block ends."""
    ended = asyncio.Event()

    async def one(first):
        async with cluster.async_client() as client:
            number = first
            while not ended.is_set():
                number += CLIENTS
                try:
                    await ask(client, number, seen)
                except Exception as error:  # of three libraries, in mid-stream
                    seen.failures[failure(error)] += 1
                    await asyncio.sleep(0.2)

    tasks = [asyncio.create_task(one(first)) for first in range(CLIENTS)]
    try:
        yield
    finally:
        ended.set()
        await asyncio.gather(*tasks)


def kill_an_ingress():
    random.choice(ingress_processes()).kill()


def kill_an_engine():
    found = {process: command_line(process) for process in engine_processes()}
    of_model = [p for p, words in found.items() if {"test/hammered", "--settings"} <= {*words}]
    random.choice([p for p in of_model if "reaper" not in str(found[p])]).kill()


@pytest.mark.parametrize("kill", [kill_an_ingress, kill_an_engine])
async def test_every_answer_that_a_client_got_is_on_the_bill_once(hammered, kill):
    already = {record["request_id"] for record in hammered.records()}
    seen = Seen()
    async with load(hammered, seen):
        for _ in range(KILLS):
            await asyncio.sleep(random.uniform(1, 2))
            before = await asyncio.to_thread(parts, hammered)
            await asyncio.to_thread(kill)
            await eventually_async(partial(whole, hammered, before), 90)
        await asyncio.sleep(1)
    records = await asyncio.to_thread(settled, hammered, already, seen)
    by_id = {f"chatcmpl-{record['request_id']}": record for record in records}
    differences = [one for one in seen.answers if not agrees(seen.answers[one], by_id.get(one))]
    states = Counter(record["state"] for record in records)
    print(
        f"{kill.__name__}: {KILLS} kills, {len(seen.answers)} answers, {len(records)} records "
        f"{dict(states)}, failures {dict(seen.failures)}, differences {len(differences)}"
    )
    assert len(seen.answers) > 50 and not differences, differences[:3]
    assert len(by_id) == len(records)
    assert not seen.failures["NotFoundError"], "an ingress took requests before it knew its models"
    # Whoever did not see the end of its answer may be billed for what was made of it, at its tier.
    unseen = len(records) - len(seen.answers)
    assert unseen <= sum(seen.failures.values())
    assert set(states) <= {"completed", "interrupted", "failed", "shed", "refused"}


def settled(cluster, before, seen):
    """Return the new records, once nothing more comes."""
    count, since = -1, time.monotonic()
    while time.monotonic() - since < 4:
        records = [r for r in cluster.records() if r["request_id"] not in before]
        if len(records) != count:
            count, since = len(records), time.monotonic()
        time.sleep(0.3)
    return records


def agrees(answer, record):
    """Whether a record says what the client was told."""
    if record is None or record["state"] != "completed":
        return False
    usage = answer["usage"]
    return (
        record["served_tier"] == answer["service_tier"]
        and record["completion_tokens"] == usage["completion_tokens"]
        and record["prompt_tokens"] == usage["prompt_tokens"]
        and Decimal(record["cost"]) == Decimal(usage["estimated_cost"])
    )


async def test_a_bill_is_the_sum_of_what_clients_were_told(hammered):
    already = await asyncio.to_thread(billed)
    seen = Seen()
    async with load(hammered, seen):
        await asyncio.sleep(3)
    assert not seen.failures
    told = sum(Decimal(answer["usage"]["estimated_cost"]) for answer in seen.answers.values())
    await eventually_async(lambda: billed()[0] - already[0] >= len(seen.answers))
    requests, cost = await asyncio.to_thread(billed)
    assert (requests - already[0], cost - already[1]) == (len(seen.answers), told)
    print(f"{len(seen.answers)} answers, {told} USD told and billed")


def billed():
    """Requests and cost of the model, as ``frontline usage`` tells them."""
    command = ["usage", "--by", "model", "--format", "json", "--ledger", ledger_url()]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    for line in result.output.splitlines():
        total = json.loads(line)
        if total.get("model") == "test/hammered":
            return total["requests"], Decimal(total["cost"])
    return 0, Decimal(0)
