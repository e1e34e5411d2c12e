"""What is begun without a task goes on in one as if it had been awaited there from the first."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.unfinished import Finished, begin

pytestmark = pytest.mark.unit

steps = st.lists(st.sampled_from(["nothing", "turn", "pause", "future"]), max_size=5)
ends = st.sampled_from([None, ValueError("failed")])


async def scripted(steps, end, log):
    try:
        for step in steps:
            log.append(step)
            if step == "turn":
                await asyncio.sleep(0)
            elif step == "pause":
                await asyncio.sleep(0.001)
            elif step == "future":
                future = asyncio.get_running_loop().create_future()
                future.set_result(None)
                await future
        if end is not None:
            raise end
        return len(steps)
    except asyncio.CancelledError:
        log.append("cancelled")
        raise


@given(steps, ends, st.none() | st.integers(0, 4))
async def test_what_was_begun_goes_on_as_if_it_had_been_awaited(steps, end, cancelled_at):
    async def awaited(log):
        return await scripted(steps, end, log)

    async def begun(log):
        rest = begin(scripted(steps, end, log))
        # It may be some time until the task goes on.
        await asyncio.sleep(0)
        return rest.result if isinstance(rest, Finished) else await rest

    async def outcome(run):
        log = []
        task = asyncio.create_task(run(log))
        while cancelled_at is not None and len(log) <= cancelled_at and not task.done():
            await asyncio.sleep(0)
        if cancelled_at is not None:
            task.cancel()
        results = await asyncio.gather(task, return_exceptions=True)
        [result] = results
        return type(result) if isinstance(result, BaseException) else result, log

    expected, got = await outcome(awaited), await outcome(begun)
    if cancelled_at is None:
        assert got == expected
    else:
        # The task may be elsewhere at that moment; what was begun does not go on by itself.
        assert got[0] in (expected[0], asyncio.CancelledError)
        done = [step for step in got[1] if step != "cancelled"]
        assert done == steps[: len(done)]


def test_what_need_not_wait_is_done_at_once():
    done = []

    async def write():
        done.append("{}")
        return 7

    begun = begin(write())
    assert isinstance(begun, Finished) and begun.result == 7 and done == ["{}"]
