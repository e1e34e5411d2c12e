"""Requests that are suspended when their engine is killed or their client leaves.

Default and flex requests take every slot, streamed and not. Then priority takes all of them over.
"""

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from functools import partial

import pytest

from tests.faults.clients import COMPLETE, CUT, ask, check_bill
from tests.faults.engines import change_engine, one_replaced, replica_ids
from tests.support.cluster import eventually_async, ingress_app, simulated_app

SLOTS = 2
TOKENS = 200
NO_ENGINE = "503 engine_not_ready"
MODELS = {"alone": 1, "pair": 2}
"""How many replicas each has."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def suspending(cluster):
    cluster.deploy(
        ingress_app(),
        *(
            simulated_app(name, replicas=replicas, slots=SLOTS, tokens_per_second=100)
            for name, replicas in MODELS.items()
        ),
    )
    cluster.wait_ready(*MODELS, timeout_s=90)
    yield cluster
    cluster.remove(*MODELS)
    cluster.restore_ingress()


@pytest.fixture(params=MODELS)
async def model(suspending, request):
    await eventually_async(lambda: is_free(suspending, request.param), 60)
    return request.param


def is_free(cluster, model):
    """Whether every replica is there, nobody is inside or waits, and the ingress has all slots."""
    board = cluster.board(model)
    if len(board.snapshot.replicas) != MODELS[model] or len(board.ingresses) != 1:
        return False
    [ingress] = board.ingresses
    demand = ingress.demand
    idle = not any([*demand.running.values(), *demand.waiting.values()])
    held = {replica.replica_id: (SLOTS, 0) for replica in board.snapshot.replicas}
    return idle and dict(demand.held) == held


def engine(cluster, model, number=0):
    with cluster.engine(model, number) as http:
        return http.get("/simulate").json()


def every(cluster, model, **wanted):
    """Whether each of the model's engines reports these counts."""
    reports = [engine(cluster, model, number) for number in range(MODELS[model])]
    return all(report[name] == value for report in reports for name, value in wanted.items())


def with_suspended_stream(cluster, model):
    """Return the process of an engine in which a stream is suspended."""
    for number in range(MODELS[model]):
        report = engine(cluster, model, number)
        bodies = [seen["body"] for seen in report["requests"]]
        if any(body.get("stream") and body["priority"] > -100 for body in bodies):
            return report["pid"]
    raise AssertionError("no stream of a lower tier has been sent")


def request(client, model, number, tier):
    return ask(
        client,
        stream=(number + number // 2) % 2 == 0,
        model=model,
        messages=[{"role": "user", "content": f"{tier} {number}"}],
        max_tokens=TOKENS,
        service_tier=tier,
    )


@asynccontextmanager
async def suspended(cluster, model):
    """Yield the tasks of the suspended requests and of those that took their slots.

    Afterwards all slots are free again, and as many requests find room at once.
    """
    records = partial(cluster.records, model=f"test/{model}")
    count, before = SLOTS * MODELS[model], len(records())
    async with cluster.async_client() as client:
        tiers = ("default", "flex")
        low = [
            asyncio.create_task(request(client, model, number, tiers[number % 2]))
            for number in range(2 * MODELS[model])
        ]
        await eventually_async(lambda: every(cluster, model, running=SLOTS))
        high = [
            asyncio.create_task(request(client, model, number, "priority"))
            for number in range(count)
        ]
        await eventually_async(lambda: every(cluster, model, running=SLOTS, waiting=SLOTS))
        yield low, high
        await eventually_async(lambda: is_free(cluster, model), 60)
        body = {"model": model, "messages": [], "max_tokens": 20, "extra_body": {"fail_fast": True}}
        await asyncio.gather(*(client.chat.completions.create(**body) for _ in range(count)))
    # Each request has one record, whether or not its client has seen the id.
    await eventually_async(lambda: len(records()) >= before + 3 * count)
    assert len(records()) == before + 3 * count


async def test_an_engine_is_killed_while_requests_are_suspended(suspending, model):
    before = replica_ids(suspending, model=model)
    async with suspended(suspending, model) as (low, high):
        os.kill(with_suspended_stream(suspending, model), signal.SIGKILL)
        answers = await asyncio.gather(*low, *high)
        await one_replaced(suspending, before, model=model)
    lost = [answer for answer in answers if answer.outcome != COMPLETE]
    assert {answer.outcome for answer in lost if answer.stream} == {CUT}
    # What had not begun is answered by the other engine, if there is one.
    unary = {answer.outcome for answer in lost if not answer.stream}
    assert unary == (set() if MODELS[model] > 1 else {NO_ENGINE})
    assert len(lost) <= 2 * SLOTS
    assert all(answer.tokens == TOKENS for answer in answers if answer.outcome == COMPLETE)
    await asyncio.to_thread(check_bill, suspending, answers)


async def test_clients_leave_while_they_are_suspended(suspending, model):
    async with suspended(suspending, model) as (low, high):
        records = len(suspending.records(model=f"test/{model}", state="interrupted"))
        for task in low:
            task.cancel()
        await asyncio.wait(low)
        # Those that took their slots still run.
        await eventually_async(lambda: every(suspending, model, running=SLOTS, waiting=0), 2)
        answers = await asyncio.gather(*high)
        left = await eventually_async(
            lambda: suspending.records(model=f"test/{model}", state="interrupted")[records:]
        )
    assert {(answer.outcome, answer.tokens) for answer in answers} == {(COMPLETE, TOKENS)}
    await asyncio.to_thread(check_bill, suspending, answers)
    assert {record["reason"] for record in left} == {"client_gone"}
    assert all(0 <= record["completion_tokens"] < TOKENS for record in left)
    counts = await eventually_async(lambda: counted(suspending, model))
    assert all(one.suspended == 0 and one.suspended_s > 0 for one in counts)


def counted(cluster, model):
    """What each replica's engine has suspended, once all of them have told."""
    counts = [replica.preempted for replica in cluster.replicas(model)]
    return counts if all(one and one.preemptions >= SLOTS for one in counts) else None


async def test_where_an_engine_preempts_no_more_headroom_is_kept_again(suspending):
    await eventually_async(lambda: is_free(suspending, "alone"), 60)
    await change_engine(suspending, model="alone", preemption=False)
    await eventually_async(lambda: headroom(suspending) == 1)
    assert not suspending.replicas("alone")[0].preempts
    async with suspending.async_client() as client:
        low = [asyncio.create_task(request(client, "alone", n, "default")) for n in range(3)]
        await eventually_async(lambda: every(suspending, "alone", running=1))
        urgent = await request(client, "alone", 0, "priority")
        assert every(suspending, "alone", waiting=0, max_running=SLOTS)
        answers = [urgent, *await asyncio.gather(*low)]
    assert {(answer.outcome, answer.tokens) for answer in answers} == {(COMPLETE, TOKENS)}


def headroom(cluster):
    return sum(ingress.report.headroom for ingress in cluster.board("alone").ingresses)
