"""A request's place in the queue, and what becomes of it. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum

from app.core.shed_reason import ShedReason
from app.core.tiers import Tier


class RequestState(StrEnum):
    """Where a request stands. It goes down this list; only a replay goes back to waiting."""

    NEW = "new"
    WAITING = "waiting"
    PLACED = "placed"
    SHED = "shed"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """One request as the queue sees it.

    The caller sets the first six; the scheduler and the queue keep the rest, for the caller to
    read.

    Attributes:
        tier: the tier at which it stands in the queue. The scheduler lowers it from priority to
        default where priority cannot be delivered to it.
        tenant: who shares fairly with other tenants of the same tier.
        tokens: how many tokens it will probably take, prompt and answer together, at least 1.
            Put right when it ends.
        route: what a replica must honour priority on for it to count as priority.
        prefix: a stable 32-bit hash of its leading messages, the same in every process; ``None``
            for no preference.
        fail_fast: whether it is shed at once when no slot is free.
        state: where it stands.
        arrived: when it arrived, in seconds.
        since: when it last began to wait, in seconds; later than ``arrived`` only for a replay.
        placed: when it was last given a slot, in seconds.
        replica_id: the replica whose slot it has, or last had.
        shed: why it was shed.
        retry_after_s: in how many seconds trying again may help, once it is shed.
        without: replicas that lost it, where it is not placed again.
    """

    tier: Tier
    tenant: str
    tokens: int
    route: Hashable = None
    prefix: int | None = None
    fail_fast: bool = False
    state: RequestState = RequestState.NEW
    arrived: float = 0.0
    since: float = 0.0
    placed: float = 0.0
    replica_id: str = ""
    shed: ShedReason | None = None
    retry_after_s: float = 0.0
    without: frozenset[str] = frozenset()
    # Requests of one tier with the same needs can use the same slots.
    needs: Hashable = None
    number: int = field(default=0, repr=False)
    replayed: bool = False
