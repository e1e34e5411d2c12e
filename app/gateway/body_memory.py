"""Bounds the memory of the request bodies in one ingress. Pure.

A body counts from before it is read until its request has ended: while it is read, queued, and
run.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from app.config.ingress import BodyLimits
from app.core.holdings import Holding, Holdings
from app.protocol.json_body.members import LONGEST_KEPT_PARSED

_PARSED_FACTOR: Final = 24
"""Bytes of memory that parsed JSON takes per byte of its text, at worst (short arrays)."""
_NOBODY: Final = ""


class NoRoom(StrEnum):
    """Why a body gets no memory."""

    TOO_LARGE = "too_large"
    """The body exceeds the limit even if there were no other."""
    TENANT = "tenant_request_memory"
    """The bodies of its tenant use up the tenant's limit."""
    INGRESS = "request_memory"
    """The bodies in this ingress use up the ingress's limit."""


class BodyMemory:
    """The memory of the bodies in one ingress, in total and by tenant, in bytes."""

    def __init__(self) -> None:
        self._holdings: Holdings[NoRoom] = Holdings()

    @property
    def used(self) -> int:
        """The bytes of all bodies."""
        return self._holdings.of(NoRoom.INGRESS)

    def used_by(self, tenant: str) -> int:
        """Return the bytes of one tenant's bodies."""
        return self._holdings.of(NoRoom.TENANT, tenant)

    def held(self, tenant: str) -> Holding[NoRoom]:
        """Return a reservation for one request of a tenant, of 0 bytes at first."""
        return Holding(self._holdings, (NoRoom.TENANT, tenant), (NoRoom.INGRESS, ""))


class HeldMemory:
    """The memory reserved for one request in a ``BodyMemory``; ``release`` gives it back."""

    __slots__ = ("_held", "tenant")

    def __init__(self, memory: BodyMemory, tenant: str) -> None:
        self.tenant = tenant
        self._held = memory.held(tenant)

    def hold(self, length: int, limits: BodyLimits) -> NoRoom | None:
        """Reserve memory for a body of ``length`` bytes in total, or return why there is none.

        It may be called again as the body grows; the new length includes the old one. Without API
        keys all requests belong to one tenant, and only the limit of the ingress applies.
        """
        tenant = self.tenant
        if length > limits.longest_for(tenant):
            return NoRoom.TOO_LARGE
        more = _cost(length) - self._held.amount
        if more <= 0:
            return None
        of_tenant = limits.total if tenant == _NOBODY else limits.tenant
        reason = self._held.grow(more, _allowed(of_tenant), _allowed(limits.total))
        return NoRoom.INGRESS if reason is NoRoom.TENANT and tenant == _NOBODY else reason

    def release(self) -> None:
        """Give the memory back. Calling it again has no effect."""
        self._held.give_back()


def _cost(length: int) -> int:
    return length + _PARSED_FACTOR * min(length, LONGEST_KEPT_PARSED)


def _allowed(limit: int) -> int:
    # A body as long as the limit must fit, including the parsed members kept beside its bytes.
    return limit + _PARSED_FACTOR * LONGEST_KEPT_PARSED
