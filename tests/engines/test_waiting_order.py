"""Which of the requests that wait inside an engine is started first, on each route.

An ingress sends no more than there are slots. So here the slots are taken, and a backlog waits in
the engine, by requests that go to the engine itself; the one that counts comes through the ingress.
What is shown is what happens first, and not how long it takes.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest

from app.core.tiers import Tier
from tests.engines.preemption_clients import of_engine
from tests.engines.subjects import Can
from tests.support.cluster import PLAIN, eventually_async

pytestmark = pytest.mark.timeout(600)

ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
ROUTES = {"chat": "/v1/chat/completions", "messages": "/anthropic/v1/messages"}
LATE, EARLIER = "the request", "of the backlog"


@pytest.fixture
def deployment(subject, request):
    return request.getfixturevalue(subject.fixture)


@asynccontextmanager
async def full(deployment, subject, order):
    """Hold all slots of the engine and keep as many requests waiting in it, all of default tier.

    Yields how many wait in the engine now, and what gives one slot free. ``order`` gets each
    request of the backlog when its first token arrives.
    """
    [replica] = deployment.replicas(subject.model)
    values, model_id = replica.dialect.priority_values, deployment.snapshot(subject.model).id
    headers, limits = {"authorization": f"Bearer {replica.key}"}, httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=replica.base_url, headers=headers, timeout=300, verify=PLAIN, limits=limits
    ) as http:
        engine, began = of_engine(http, model_id, values), asyncio.Queue()

        def send(tokens, first):
            stream = engine.stream(Tier.DEFAULT, tokens, first=first, prompt="Once upon")
            return asyncio.create_task(stream)

        def waiting():
            with deployment.engine(subject.model) as asked:
                return subject.engine.waiting(asked)

        running = [send(3000, lambda: began.put_nowait(1)) for _ in range(replica.slots)]
        backlog = []
        try:
            for _ in running:
                await began.get()
            backlog += [send(8, lambda: order.append(EARLIER)) for _ in running]
            await eventually_async(lambda: waiting() == len(backlog))
            yield waiting, running[0].cancel
            assert all(answer.ended for answer in await asyncio.gather(*backlog))
        finally:
            for one in (*running, *backlog):
                one.cancel()
            await asyncio.wait((*running, *backlog))


async def ask(deployment, subject, route, tier):
    """Yield at each piece of the text of an answer that comes through the ingress."""
    body = {"model": subject.model, **ASK, "max_tokens": 64, "stream": True, "service_tier": tier}
    async with (
        httpx.AsyncClient(base_url=deployment.root, timeout=300, verify=PLAIN) as http,
        http.stream("POST", ROUTES[route], json=body) as answer,
    ):
        assert (answer.status_code, answer.headers["x-service-tier"]) == (200, tier)
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and _has_text(json.loads(line[6:])):
                yield line


def _has_text(event):
    if event.get("type") == "content_block_delta":
        return bool(event["delta"].get("text"))
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tier", ["priority", "default"])
async def test_priority_is_started_before_a_backlog_in_the_engine(subject, deployment, route, tier):
    """Default, which came last, is started last: so it is the priority that decides."""
    needed = {Can.PRIORITIZE, *([Can.MESSAGE] if route == "messages" else [])}
    if needed - subject.can or subject.engine.waiting is None:
        pytest.skip(f"{subject.engine.shown} does not do that, or tell how many wait in it")
    order = []
    async with full(deployment, subject, order) as (waiting, give_one_slot_free):
        backlog = waiting()

        async def late():
            async for _ in ask(deployment, subject, route, tier):
                order.append(LATE)

        asked = asyncio.create_task(late())
        if tier == "priority" and Can.PREEMPT in subject.can:
            # It takes the slot of a running one. Nothing else can start meanwhile.
            await eventually_async(lambda: LATE in order, 60)
        else:
            await eventually_async(lambda: waiting() > backlog)
        give_one_slot_free()
        await asked
    assert LATE in order, "its answer has no text"
    before = order.index(LATE)
    assert before == (0 if tier == "priority" else backlog)
