"""How much memory the request bodies in one ingress may take. Pure.

A body counts from before it is read until its request has ended: while it is read, waits in the
queue, and runs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from app.config.ingress import BodyLimits
from app.core.holdings import Holding, Holdings
from app.protocol.json_body.members import LONGEST_KEPT_PARSED

_PARSED_FACTOR: Final = 24
"""Bytes that parsed JSON takes at the worst for each byte that it had (short arrays)."""
_NOBODY: Final = ""


class NoRoom(StrEnum):
    """Why a body finds no room."""

    TOO_LARGE = "too_large"
    """It could not have room even if it were alone."""
    TENANT = "tenant_request_memory"
    """The bodies of its tenant take all that one tenant may."""
    INGRESS = "request_memory"
    """The bodies in this ingress take all that there is."""


class BodyMemory:
    """What the bodies in one ingress take, together and by tenant."""

    def __init__(self) -> None:
        self._holdings: Holdings[NoRoom] = Holdings()

    @property
    def used(self) -> int:
        """The bytes of all."""
        return self._holdings.of(NoRoom.INGRESS)

    def used_by(self, tenant: str) -> int:
        """Return the bytes of one tenant."""
        return self._holdings.of(NoRoom.TENANT, tenant)

    def held(self, tenant: str) -> Holding[NoRoom]:
        """Return the room of one request of a tenant, empty as yet."""
        return Holding(self._holdings, (NoRoom.TENANT, tenant), (NoRoom.INGRESS, ""))


class HeldMemory:
    """The room of one request in a ``BodyMemory``; ``release`` gives it back."""

    __slots__ = ("_held", "tenant")

    def __init__(self, memory: BodyMemory, tenant: str) -> None:
        self.tenant = tenant
        self._held = memory.held(tenant)

    def hold(self, length: int, limits: BodyLimits) -> NoRoom | None:
        """Hold room for a body of ``length`` bytes in all, or return why there is none.

        It may be called again as a body grows; what it held before is part of it. Without keys
        everybody is one tenant, for which only the bound of all holds.
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
        """Give the room back. Calling it again has no effect."""
        self._held.give_back()


def _cost(length: int) -> int:
    return length + _PARSED_FACTOR * min(length, LONGEST_KEPT_PARSED)


def _allowed(limit: int) -> int:
    # A body as long as the whole limit has room, with what is kept beside its bytes.
    return limit + _PARSED_FACTOR * LONGEST_KEPT_PARSED
