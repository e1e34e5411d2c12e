"""Waiting for what a test has brought about, on its event loop."""

import asyncio
import time


async def until(condition, timeout_s=10):
    """Return once the condition holds; fail after a time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
