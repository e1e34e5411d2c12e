"""Whether a running engine can be held to fewer requests than it was started for."""

import asyncio

from deployments.engines.base import Launch
from deployments.replica import LocalEngine


async def most_at_once(adapter, model, replica, slots, running):
    """Hold an engine to so many slots, send it more requests, and let it run all again.

    Returns whether it said that it is held to them, and the most that it ran at once. ``running``
    asks it how many it runs now.
    """
    engine = LocalEngine(replica.base_url, replica.key)
    launch = Launch("m", model, "127.0.0.1", 0, replica.slots, replica.key, "python")
    body = {"model": model, "prompt": "Once", "max_tokens": 24, "ignore_eos": True}
    limited, most = await adapter.limit(launch, engine, slots), 0
    try:
        asked = [
            asyncio.create_task(engine.post_json("/v1/completions", body)) for _ in range(slots + 3)
        ]
        while not all(task.done() for task in asked):
            most = max(most, await asyncio.to_thread(running))
            await asyncio.sleep(0.05)
        assert [status for status, _ in await asyncio.gather(*asked)] == [200] * (slots + 3)
    finally:
        assert await adapter.limit(launch, engine, replica.slots)
    return limited, most
