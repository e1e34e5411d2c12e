"""However a request ends, nothing keeps its body, though the collector does not run.

Memory for bodies is bounded by their bytes, and the collector goes by numbers of objects.
"""

import asyncio
import gc

import pytest

from app.config.model import ModelSettings
from app.contracts.status import Sleep
from app.core.dialect import Route
from app.gateway.lifecycle import Lifecycle
from app.protocol.requests import Inbound
from deployments.simulator.settings import InjectedFailures
from tests.support.waiting import until
from tests.support.world import ALIAS, HANG_UP, Seen, World

pytestmark = pytest.mark.unit

MODEL = ModelSettings.load({"queue": {"headroom": 0}}, "user_config")
FIELDS = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
TOO_LONG = {"messages": [{"role": "user", "content": "word " * 20_000}]}
HANG, ERROR = InjectedFailures(request="hang"), InjectedFailures(request="error")
HANG_LATER = InjectedFailures(request="hang", after_tokens=2)


BEFORE: set[int] = set()


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    await made.set(MODEL, ["vllm"])
    gc.collect()
    gc.disable()
    # Modules of other tests may have some as constants.
    BEFORE.update(map(id, kept()))
    yield made
    BEFORE.clear()
    gc.enable()
    await made.close()


def asking(world, *plan, **more):
    seen = Seen(None, list(plan))
    return seen, asyncio.create_task(world.ask(seen, Route.CHAT, FIELDS | more, "plain"))


def kept():
    found = [one for one in gc.get_objects() if isinstance(one, Inbound | Lifecycle)]
    return [one for one in found if id(one) not in BEFORE]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("plan", "more", "status"),
    [
        ([], {}, 200),
        ([], TOO_LONG, 400),
        ([], {"model": "nobody"}, 404),
        ([ERROR], {}, 500),
        ([HANG_UP, HANG_UP], {}, 503),
        ([HANG], {}, 503),
    ],
    ids=["answered", "refused by the engine", "unknown model", "engine error", "lost", "silent"],
)
async def test_of_a_request_that_has_its_answer(world, plan, more, status, stream):
    _, task = asking(world)
    await task
    seen, task = asking(world, *plan, stream=stream, **more)
    await asyncio.wait([task])
    assert seen.status == status
    assert kept() == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_of_a_request_that_is_left_before_its_answer(world, stream):
    seen, task = asking(world, HANG, stream=stream)
    await until(lambda: seen.attempts)
    assert kept()
    await left(task)


async def test_of_a_stream_that_is_left(world):
    seen, task = asking(world, HANG_LATER, stream=True)
    await until(lambda: seen.pieces)
    await left(task)


async def test_of_a_request_that_is_left_in_the_queue(world):
    await world.set(MODEL, [], sleep=Sleep((), waking=True), pools=("vllm",))
    seen, task = asking(world)
    await until(kept)
    await asyncio.sleep(0.1)
    assert not seen.status
    await left(task)


async def left(task):
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert kept() == []
