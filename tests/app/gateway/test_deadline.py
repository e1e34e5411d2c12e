import asyncio
from contextlib import suppress

import pytest

from app.gateway.deadline import Deadline

pytestmark = pytest.mark.unit


def soon(seconds=0.02):
    return asyncio.get_running_loop().time() + seconds


async def test_what_takes_too_long_times_out():
    with pytest.raises(TimeoutError), Deadline(soon()):
        await asyncio.Event().wait()
    # Nothing is left of it: the task can wait again.
    await asyncio.sleep(0.05)
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0


async def test_what_ends_in_time_is_left_alone():
    with Deadline(soon()):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)


async def test_an_error_is_raised_as_it_is():
    with pytest.raises(KeyError), Deadline(soon()):
        raise KeyError


@pytest.mark.parametrize("before", [True, False])
async def test_a_task_that_is_cancelled_as_well_stays_cancelled(before):
    async def wait():
        with Deadline(soon()):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    # In the same iteration of the event loop as the deadline, or long before it.
    loop.call_at(soon(0.0 if before else 0.02), task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deadline_that_passes_as_the_wait_ends_leaves_no_cancellation():
    future = asyncio.get_running_loop().create_future()
    at = soon()
    asyncio.get_running_loop().call_at(at, future.set_result, 1)

    async def wait():
        with Deadline(at):
            await future
        await asyncio.sleep(0.01)
        return "done"

    # Both came in one iteration, so it may be either.
    with suppress(TimeoutError):
        assert await wait() == "done"
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
