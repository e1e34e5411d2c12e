"""Why a request is turned away from the queue."""

from __future__ import annotations

from enum import StrEnum


class ShedReason(StrEnum):
    """Why a request is turned away; HTTP's 429, or 503, is made from it elsewhere."""

    QUEUE_FULL = "queue_full"
    """As many requests wait as the queue takes at this tier, and none of a lower tier."""
    WAITED_TOO_LONG = "waited_too_long"
    """The longest wait of its tier is over."""
    DISPLACED = "displaced"
    """It made room in a full queue for a request of a higher tier."""
    FAIL_FAST = "fail_fast"
    """No slot was free, and the client asked not to wait."""
    NO_OTHER_REPLICA = "no_other_replica"
    """The replica that had it failed before its first byte, and there is no other."""
    NOT_OFFERED = "engine_not_offered"
    """No node of the cluster offers what the model's engines ask for, and has not for a while."""
