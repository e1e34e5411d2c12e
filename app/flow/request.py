"""A request in the scheduler: its state, its order in the queue, and its outcome. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum

from app.core.shed_reason import ShedReason
from app.core.tiers import Tier


class RequestState(StrEnum):
    """State of a request. It moves down this list; only a replay goes back to WAITING."""

    NEW = "new"
    WAITING = "waiting"
    PLACED = "placed"
    SHED = "shed"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """One request as the scheduler sees it.

    The caller sets the first seven attributes. The scheduler and the queue maintain the rest; the
    caller may read them.

    Attributes:
        tier: the tier at which it is queued. The scheduler lowers it from priority to default if
            priority cannot be delivered to it.
        tenant: the tenant; tenants of the same tier share slots fairly.
        tokens: estimate of its tokens, prompt and answer together, at least 1. The tenant's
            counter is corrected when it ends.
        route: the route on which a replica must honour priority for it to count as priority.
        prefix: a stable 32-bit hash of its leading messages, the same in every process; ``None``
            for no preference.
        fail_fast: whether it is shed at once when no slot is free.
        sequences: how many slots it takes, if a replica has as many.
        state: its current state.
        arrived: when it arrived, in seconds.
        since: when it last began to wait, in seconds; later than ``arrived`` only for a replay.
        placed: when it last received a slot, in seconds.
        replica_id: the replica whose slots it has, or last had.
        slots: how many slots it has there, or last had.
        shed: why it was shed; ``None`` if it was not.
        retry_after_s: after how many seconds a retry may succeed, once it is shed.
        without: replicas that failed it; it is not placed there again.
    """

    tier: Tier
    tenant: str
    tokens: int
    route: Hashable = None
    prefix: int | None = None
    fail_fast: bool = False
    sequences: int = 1
    state: RequestState = RequestState.NEW
    arrived: float = 0.0
    since: float = 0.0
    placed: float = 0.0
    replica_id: str = ""
    slots: int = 1
    shed: ShedReason | None = None
    retry_after_s: float = 0.0
    without: frozenset[str] = frozenset()
    # Requests of one tier with the same needs can use the same slots.
    needs: Hashable = None
    number: int = field(default=0, repr=False)
    replayed: bool = False
