"""The Serve deployment that shares limits out among the ingresses: one small actor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray import serve

from app.ray_compat.serve_port import keep_on_loopback
from app.tenants.limiter import LimitBooks
from app.tenants.rate_limit import Ask, Given


class Limits:
    """Every limit that is used. What it knows is a minute old at most, and is lost with it."""

    def __init__(self) -> None:
        keep_on_loopback()
        self._books = LimitBooks()

    async def answer(self, asks: Mapping[str, Ask]) -> dict[str, Given]:
        """Answer what an ingress asks."""
        return self._books.answer(asks, time.monotonic())


class ServeLimits:
    """The same, reached from an ingress."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def answer(self, asks: Mapping[str, Ask]) -> Mapping[str, Given]:
        """See ``Limits.answer``."""
        given: Mapping[str, Given] = await self._handle.answer.remote(asks)
        return given


deployment = serve.deployment(
    name="Limits",
    # A few small questions a second from each ingress, and nothing to compute.
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=10_000,
)(Limits)
"""To be bound in the ingress's application."""
