"""How many requests of a key, and of a tenant, are in flight at one ingress. Pure.

In flight is a request from its arrival until its answer has ended: waiting or running. Each ingress
keeps to its own part of a bound, so that no message stands between a request and its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from app.config.ingress import FlightBounds
from app.core.holdings import Holding, Holdings
from app.tenants.rate_limit import split_limit


class Holder(StrEnum):
    """Whose requests a bound counts."""

    KEY = "API key"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class OverBound(Exception):
    """A request is one too many: of whom, and how many there may be at this ingress."""

    holder: Holder
    part: int


class InFlight:
    """The requests that are in flight at this ingress. Remembers nobody who has none."""

    def __init__(self) -> None:
        self._holdings: Holdings[Holder] = Holdings()

    def enter(
        self, key_id: str, tenant: str, bounds: FlightBounds, ingresses: int
    ) -> Holding[Holder]:
        """Count a request until the block that is returned has been left.

        Args:
            key_id: the key's.
            tenant: the key's tenant.
            bounds: those in force now.
            ingresses: how many ingresses share them.

        Raises:
            OverBound: there are as many as there may be; it is not counted.
        """
        parts = (split_limit(bounds.key, ingresses), split_limit(bounds.tenant, ingresses))
        flight = Holding(self._holdings, (Holder.KEY, key_id), (Holder.TENANT, tenant))
        over = flight.grow(1, *parts)
        if over is not None:
            raise OverBound(over, parts[over is Holder.TENANT])
        return flight

    def of(self, holder: Holder, name: str) -> int:
        """Return how many requests somebody has in flight."""
        return self._holdings.of(holder, name)

    def __len__(self) -> int:
        """Return how many keys and tenants it remembers."""
        return len(self._holdings)
