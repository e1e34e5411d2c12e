"""Bounds the requests of a key, and of a tenant, that are in flight at one ingress. Pure.

A request is in flight from its arrival until its answer has ended, while it is queued and while it
runs. Each ingress applies its own part of a bound, so that a request waits for no message.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from app.config.ingress import FlightBounds
from app.core.holdings import Holding, Holdings
from app.tenants.allowance import split_limit


class Holder(StrEnum):
    """The kind of owner whose requests a bound counts."""

    KEY = "API key"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class OverBound(Exception):
    """A request exceeds a bound: the kind of its owner, and the bound at this ingress."""

    holder: Holder
    part: int


class InFlight:
    """The requests in flight at this ingress. It keeps no entry for owners without requests."""

    def __init__(self) -> None:
        self._holdings: Holdings[Holder] = Holdings()

    def enter(
        self, key_id: str, tenant: str, bounds: FlightBounds, ingresses: int
    ) -> Holding[Holder]:
        """Count a request until the returned context has been left.

        Args:
            key_id: the id of the request's key.
            tenant: the key's tenant.
            bounds: the bounds in force.
            ingresses: how many ingresses share them.

        Raises:
            OverBound: a bound is reached; the request is not counted.
        """
        parts = (split_limit(bounds.key, ingresses), split_limit(bounds.tenant, ingresses))
        flight = Holding(self._holdings, (Holder.KEY, key_id), (Holder.TENANT, tenant))
        over = flight.grow(1, *parts)
        if over is not None:
            raise OverBound(over, parts[over is Holder.TENANT])
        return flight

    def of(self, holder: Holder, name: str) -> int:
        """Return how many requests a key or tenant has in flight."""
        return self._holdings.of(holder, name)

    def __len__(self) -> int:
        """Return how many keys and tenants have requests in flight."""
        return len(self._holdings)
