"""How long tests wait for what they have brought about.

Tests tell by what happens, and not by how long it takes: a bound only ends a test that would wait
for ever. Bounds are written as what an idle machine needs many times over; a machine that has other
work as well gets ``SLOWEST`` times as long.
"""

import asyncio
import time
from typing import Any, Final

from tenacity import Retrying, stop_after_attempt

SLOWEST: Final = 5
"""How many times longer than on an idle machine everything may take."""
PATIENCE_S: Final = SLOWEST * 110
"""How long clients wait for an answer: a little less than a test may take."""


def starting(**options: Any) -> Retrying:
    """Return what calls a function that starts a node of Ray up to three times.

    On a busy machine a node may take longer than the 30 s that Ray waits for it. ``options`` are
    those of tenacity.
    """
    return Retrying(stop=stop_after_attempt(3), reraise=True, **options)


async def until(condition, timeout_s=10):
    """Return once the condition holds, on the test's event loop; fail after a time."""
    deadline = time.monotonic() + SLOWEST * timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
