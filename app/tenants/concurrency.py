"""How many requests of a key, and of a tenant, are in flight at one ingress. Pure.

In flight is a request from its arrival until its answer has ended: waiting or running. Each ingress
keeps to its own part of a bound, so that no message stands between a request and its place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from app.config.ingress import FlightBounds
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
        self._counts: Counter[tuple[Holder, str]] = Counter()

    def enter(self, key_id: str, tenant: str, bounds: FlightBounds, ingresses: int) -> Flight:
        """Count a request; it is to be left exactly once, as a context manager.

        Args:
            key_id: the key's.
            tenant: the key's tenant.
            bounds: those in force now.
            ingresses: how many ingresses share them.

        Raises:
            OverBound: there are as many as there may be; it is not counted.
        """
        held = ((Holder.KEY, key_id, bounds.key), (Holder.TENANT, tenant, bounds.tenant))
        for holder, name, bound in held:
            part = split_limit(bound, ingresses)
            if self._counts[holder, name] >= part:
                raise OverBound(holder, part)
        places = tuple((holder, name) for holder, name, _ in held)
        self._counts.update(places)
        return Flight(self, places)

    def of(self, holder: Holder, name: str) -> int:
        """Return how many requests somebody has in flight."""
        return self._counts[holder, name]

    def __len__(self) -> int:
        """Return how many keys and tenants it remembers."""
        return len(self._counts)

    def _leave(self, places: tuple[tuple[Holder, str], ...]) -> None:
        for place in places:
            self._counts[place] -= 1
            if not self._counts[place]:
                del self._counts[place]


class Flight:
    """One request in flight, until the block is left."""

    __slots__ = ("_book", "_places")

    def __init__(self, book: InFlight, places: tuple[tuple[Holder, str], ...]) -> None:
        self._book = book
        self._places = places

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        places, self._places = self._places, ()
        self._book._leave(places)
