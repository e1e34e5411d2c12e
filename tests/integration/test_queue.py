"""The queue, seen from outside: who goes first, who is turned away, and what the engines hold."""

import asyncio
import time
from collections import Counter
from contextlib import contextmanager

import openai
import pytest

from tests.support.cluster import (
    eventually,
    eventually_async,
    ingress_app,
    running_ingresses,
    simulated_app,
)
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.integration

PRIORITY, DEFAULT = -100, 0


def narrow(*, replicas=1, slots=1, **queue):
    """A model with few slots and an engine slow enough for a queue to form.

    It preempts nothing, so that nobody is placed but on a free slot.
    """
    return simulated_app(
        "narrow",
        settings={"queue": {"headroom": 0, **queue}},
        preemption=False,
        slots=slots,
        replicas=replicas,
        tokens_per_second=40,
    )


def deploy(frontline, app):
    """Deploy the model, and wait until it is as it should be and nobody asks.

    And for its slots: a Model that has just started first listens.
    """
    frontline.deploy(app)
    wanted = [app["args"]["pools"][0]["slots"]] * app["deployments"][1]["num_replicas"]
    eventually(lambda: slots(frontline) == wanted, 60)
    request = {"model": "narrow", "messages": [], "max_tokens": 1, "fail_fast": True}
    with frontline.http() as http:
        eventually(lambda: http.post("/v1/chat/completions", json=request).status_code == 200)
    eventually(lambda: not any(seen(frontline, i)["running"] for i in range(len(wanted))))
    with frontline.engine("narrow") as engine:
        engine.post("/simulate", json={"forget": True})


def slots(frontline):
    """The slots of each replica."""
    return [replica.slots for replica in frontline.replicas("narrow")]


@pytest.fixture(scope="module")
def deployed(frontline):
    """One model for all of them: it takes longer to come and go than most tests take."""
    yield frontline
    frontline.remove("narrow")


@pytest.fixture
def model(deployed):
    deploy(deployed, narrow())
    return deployed


async def ask(client, tier="default", tokens=20, **more):
    """Return the answer's headers and body, or the error."""
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model="narrow",
            messages=[{"role": "user", "content": f"question {time.monotonic()}"}],
            max_tokens=tokens,
            service_tier=tier,
            **more,
        )
    except openai.APIStatusError as error:
        return error
    return raw


def seen(frontline, replica=0):
    with frontline.engine("narrow", replica) as engine:
        return engine.get("/simulate").json()


def started(frontline):
    return [start["priority"] for start in seen(frontline)["starts"]]


async def ask_many(client, count, tier="default", tokens=20):
    tasks = [asyncio.create_task(ask(client, tier, tokens)) for _ in range(count)]
    await asyncio.sleep(0.3)
    return tasks


async def test_priority_goes_before_everyone_who_waits(model):
    async with model.async_client() as client:
        waiting = await ask_many(client, 6)
        jumping = await ask(client, "priority")
        answers = await asyncio.gather(*waiting)
    order = started(model)
    assert order.count(DEFAULT) == 6
    # One runs when it comes, and that one may have ended just then.
    assert order.index(PRIORITY) <= 2
    assert jumping.parse().service_tier == "priority"
    times = sorted(float(answer.headers["x-queue-time-ms"]) for answer in answers)
    assert times[0] < SLOWEST * 100 and times[-1] > 1000


@contextmanager
def bounded(model, **queue):
    """The model with another queue."""
    before = model.snapshot("narrow").settings.queue

    def change(app, done):
        model.deploy(app)
        eventually(lambda: done(model.snapshot("narrow").settings.queue))
        time.sleep(0.5)  # the ingress has heard of it

    change(narrow(**queue), lambda now: now != before)
    try:
        yield
    finally:
        change(narrow(), lambda now: now == before)


async def test_who_finds_the_line_full_is_turned_away_and_priority_displaces(model):
    bounds = {"max_waiting": 2}
    with bounded(model, flex=bounds, default=bounds, priority=bounds):
        async with model.async_client() as client:
            waiting = await ask_many(client, 6)
            jumping = await ask(client, "priority")
            answers = await asyncio.gather(*waiting)
    shed = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert len(shed) == 4, "one runs and two wait, of which one is displaced"
    reasons = Counter(error.response.headers["x-shed-reason"] for error in shed)
    assert reasons == {"queue_full": 3, "displaced": 1}
    for error in shed:
        assert error.code == "engine_overloaded"
        assert error.type == "invalid_request_error"
        assert int(error.response.headers["retry-after"]) >= 1
        assert int(error.response.headers["retry-after-ms"]) >= 1
        assert float(error.response.headers["x-queue-time-ms"]) >= 0
    assert jumping.parse().service_tier == "priority"
    assert seen(model)["received"] == 3, "who is turned away never reaches the engine"


async def test_who_does_not_want_to_wait_is_told_at_once(model):
    async with model.async_client() as client:
        assert (await ask(client, extra_body={"fail_fast": True})).parse().choices
        [running] = await ask_many(client, 1, tokens=120)
        refused = await ask(client, "priority", extra_body={"fail_fast": True})
        assert isinstance(refused, openai.RateLimitError)
        assert not running.done(), "it has waited"
        await running


async def test_who_leaves_while_waiting_leaves_the_line(model):
    async with model.async_client() as client:
        [running] = await ask_many(client, 1, tokens=60)
        leaving = await ask_many(client, 5)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        last = await ask(client)
        await running
    assert last.parse().choices
    assert seen(model)["received"] == 2, "those who left were never sent"


async def test_no_slot_leaks(model):
    """Disconnects in every state, errors and sheds: after all of it every slot is free."""
    async with model.async_client() as client:
        for round_number in range(4):
            tasks = await ask_many(client, 4, ["priority", "default", "flex"][round_number % 3])
            for task in tasks[: round_number + 1]:
                task.cancel()
            await asyncio.wait(tasks)
        with model.engine("narrow") as engine:
            engine.post("/simulate", json={"failures": {"request": "error", "status": 500}})
            assert isinstance(await ask(client), openai.InternalServerError)
            engine.post("/simulate", json={"failures": {}})
        await eventually_async(lambda: seen(model)["running"] == 0)
        free = await ask(client, extra_body={"fail_fast": True})
    assert free.parse().choices
    assert seen(model)["max_running"] == 1


async def test_a_new_replica_takes_those_who_wait(model):
    async with model.async_client() as client:
        waiting = await ask_many(client, 40, tokens=40)
        model.deploy(narrow(replicas=2))
        await eventually_async(lambda: len(model.snapshot("narrow").replicas) == 2, 30)
        await eventually_async(lambda: all(seen(model, i)["received"] for i in (0, 1)), 5)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_who_waits_for_a_model_that_is_removed_is_told(model):
    async with model.async_client() as client:
        waiting = await ask_many(client, 4, tokens=400)
        await asyncio.to_thread(model.remove, "narrow")
        async with asyncio.timeout(SLOWEST * 10):
            answers = await asyncio.gather(*waiting, return_exceptions=True)
    gone = [answer for answer in answers if isinstance(answer, openai.NotFoundError)]
    assert len(gone) >= 3, "the one that runs may be finished, or lose its engine"


async def test_two_ingresses_never_give_an_engine_more_than_its_slots(deployed):
    frontline = deployed
    await asyncio.to_thread(frontline.deploy, ingress_app(replicas=2))
    try:
        await asyncio.to_thread(deploy, frontline, narrow(slots=4))
        await eventually_async(lambda: running_ingresses() == 2, 60)
        await asyncio.sleep(1)  # HAProxy has heard of both
        async with frontline.async_client() as client:
            waiting = await ask_many(client, 60, tokens=40)
            await asyncio.sleep(2)
            before = len(started(frontline))
            jumping = await asyncio.gather(*await ask_many(client, 6, "priority"))
            state, order = seen(frontline), started(frontline)[before:]
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
    finally:
        await asyncio.to_thread(frontline.restore_ingress)
    assert state["max_running"] == 4, "all slots, and never one more"
    assert [answer.parse().service_tier for answer in jumping] == ["priority"] * 6
    # About fifty waited at the two ingresses. Until the last of the six was placed only those went
    # first whose slot came free, four of them a second, before its ingress had heard of the six.
    last = len(order) - order[::-1].index(PRIORITY)
    assert order[:last].count(PRIORITY) == 6
    assert order[:last].count(DEFAULT) <= 6
