import asyncio

import pytest

from app.flow.credits import SILENCE_S
from deployments.control.wakeups import Wakeups

pytestmark = pytest.mark.unit


async def test_who_listens_is_told_at_once():
    wakeups = Wakeups()
    listening = asyncio.create_task(wakeups.wait("one", 60.0))
    other = asyncio.create_task(wakeups.wait("two", 60.0))
    await asyncio.sleep(0)
    wakeups.wake("one", 0.0)
    async with asyncio.timeout(1):
        assert await listening
    assert not other.done()
    other.cancel()


async def test_who_does_not_listen_is_told_as_soon_as_it_does():
    wakeups = Wakeups()
    assert not await wakeups.wait("one", 0.01)
    wakeups.wake("one", 0.0)
    assert await wakeups.wait("one", 0.0)
    assert not await wakeups.wait("one", 0.01), "once"


async def test_who_has_renewed_meanwhile_need_not_be_told():
    wakeups = Wakeups()
    wakeups.wake("one", 0.0)
    wakeups.renewed("one")
    assert not await wakeups.wait("one", 0.01)


async def test_an_ingress_that_is_gone_is_forgotten():
    wakeups = Wakeups()
    for generation in range(100):
        wakeups.wake(f"ingress {generation}", generation * SILENCE_S)
    told = [await wakeups.wait(f"ingress {generation}", 0.0) for generation in range(100)]
    assert told == [False] * 99 + [True]


async def test_a_listener_that_was_given_up_does_not_swallow_a_nudge():
    wakeups = Wakeups()
    listening = asyncio.create_task(wakeups.wait("one", 60.0))
    await asyncio.sleep(0)
    listening.cancel()
    wakeups.wake("one", 0.0)
    await asyncio.wait([listening])
    assert await wakeups.wait("one", 0.0)
