"""A request in the scheduler: its state, its order in the queue, and its outcome. Pure."""

from __future__ import annotations

import math
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

    The caller sets the attributes down to ``raise_only``. The scheduler and the queue maintain the
    rest; the caller may read them.

    Attributes:
        tier: the tier at which it is queued. The scheduler lowers it from priority to default if
            priority cannot be delivered to it, and raises it if it has not started in time.
        tenant: the tenant; tenants of the same tier share slots fairly.
        tokens: estimate of its tokens, prompt and answer together, at least 1. The tenant's
            counter is corrected when it ends.
        route: the route on which a replica must honour priority for it to count as priority.
        prefix: a stable 32-bit hash of its leading messages, the same in every process; ``None``
            for no preference.
        fail_fast: whether it is shed at once when no slot is free.
        sequences: how many slots it takes, if a replica has as many.
        start_within_s: after how many seconds of waiting it is raised; infinity for never. Without
            effect on a replay, which has started once.
        raise_to: the tier that it is raised to, if that is better than its own. If priority cannot
            be delivered to it then, it is raised to default instead.
        raise_only: whether it stays where it is in that case.
        state: its current state.
        arrived: when it arrived, in seconds.
        since: when it last began to wait, in seconds; later than ``arrived`` only for a replay.
        raised_from: the tier at which it arrived, if it was raised.
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
    start_within_s: float = math.inf
    raise_to: Tier = Tier.DEFAULT
    raise_only: bool = False
    state: RequestState = RequestState.NEW
    arrived: float = 0.0
    since: float = 0.0
    raised_from: Tier | None = None
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
