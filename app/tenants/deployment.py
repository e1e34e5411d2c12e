"""The ``Limits`` deployment: one small actor that shares limits out among the ingresses, and tells
each of them what the others have spent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ray import serve

from app.ray_compat.serve_port import keep_on_loopback
from app.tenants.budget import SpendId
from app.tenants.limiter import LimitBooks
from app.tenants.rate_limit import Ask, Given
from app.tenants.spending import Parts, SpendBook, SpendReport


class Limits:
    """All limits in use. Its state covers the last minute, and is lost when the actor ends."""

    def __init__(self) -> None:
        keep_on_loopback()
        self._books = LimitBooks()
        self._spend = SpendBook()

    async def answer(self, asks: Mapping[str, Ask]) -> dict[str, Given]:
        """Return the allowance for each ask of an ingress, by the name of the limit."""
        return self._books.answer(asks, time.monotonic())

    async def spend(self, report: SpendReport) -> dict[SpendId, dict[str, Decimal]]:
        """Note what an ingress has spent; return what all have, by ingress."""
        return self._spend.answer(report, time.monotonic())


class ServeLimits:
    """Calls the ``Limits`` deployment from an ingress."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def answer(self, asks: Mapping[str, Ask]) -> Mapping[str, Given]:
        """See ``Limits.answer``."""
        given: Mapping[str, Given] = await self._handle.answer.remote(asks)
        return given

    async def spend(self, report: SpendReport) -> Mapping[SpendId, Parts]:
        """See ``Limits.spend``."""
        parts: Mapping[SpendId, Parts] = await self._handle.spend.remote(report)
        return parts


deployment = serve.deployment(
    name="Limits",
    # It serves a few small calls a second from each ingress, and computes next to nothing.
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=10_000,
)(Limits)
"""The deployment, to be bound in the ingress's application."""
