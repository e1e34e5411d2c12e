"""Every request that arrives is told to observers once, however it ends."""

import asyncio
from collections import Counter

import pytest

from app.config.model import ModelSettings
from app.core.dialect import Route
from tests.support.waiting import until
from tests.support.world import ALIAS, SLOTS, Seen, World

pytestmark = pytest.mark.unit

LONG = {
    "model": ALIAS,
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 400,
    "stream": True,
}


class Told:
    def __init__(self):
        self.ends, self.requests = [], []

    def ended(self, request):
        self.requests.append(request)
        self.ends.append((request.record.state.value, request.record.reason, request.status))

    def refused(self, request):
        self.requests.append(request)
        self.ends.append(("refused", request.reason, request.status))


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings.load({"queue": {"headroom": 0}}, "x"), ["vllm"])
    yield made
    await made.close()


async def leave(*asking):
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)


async def test_a_client_that_leaves_is_told_wherever_its_request_is(world):
    told = Told()
    world.services.observers.add(told)
    seen = [Seen(None, []) for _ in range(SLOTS + 2)]
    running = [
        asyncio.create_task(world.ask(one, Route.CHAT, LONG, "plain")) for one in seen[:SLOTS]
    ]
    await until(lambda: all(one.body for one in seen[:SLOTS]))
    waiting = [
        asyncio.create_task(world.ask(one, Route.CHAT, LONG, "plain")) for one in seen[SLOTS:]
    ]
    admission = world.registry.find(ALIAS)
    await until(lambda: sum(admission.demand().waiting.values()) == 2)
    await leave(*waiting)
    await leave(*running)
    assert Counter(told.ends) == {
        ("abandoned", "client_gone", 499): 2,
        ("interrupted", "client_gone", 499): SLOTS,
    }
    assert {one.record.origin.request_id for one in told.requests} == {o.request_id for o in seen}
    records = await world.new_records()
    assert {one["state"] for one in records.values()} == {"interrupted"}
    assert world.taken() == 0


async def test_a_request_that_the_ingress_fails_is_told(world, monkeypatch):
    told = Told()
    world.services.observers.add(told)
    monkeypatch.setattr("app.flow.admission.Admission.admit", lambda *_: 1 / 0)
    seen = Seen(None, [])
    with pytest.raises(ZeroDivisionError):
        await world.ask(seen, Route.CHAT, LONG, "plain")
    assert (seen.status, told.ends) == (500, [("abandoned", "internal_error", 500)])
