"""Why a request is shed."""

from __future__ import annotations

from enum import StrEnum


class ShedReason(StrEnum):
    """Why a request is shed. The gateway maps it to HTTP 429 or 503."""

    QUEUE_FULL = "queue_full"
    """The queue is full for this tier, and no request of a lower tier can be displaced."""
    WAITED_TOO_LONG = "waited_too_long"
    """It has waited for its tier's longest wait."""
    DISPLACED = "displaced"
    """It made room in a full queue for a request of a higher tier."""
    FAIL_FAST = "fail_fast"
    """No slot was free, and the client asked not to wait."""
    NO_OTHER_REPLICA = "no_other_replica"
    """Its replica failed before the first byte, and there is no other."""
    NOT_OFFERED = "engine_not_offered"
    """No node of the cluster has offered what the model's engines require, for a while."""
    ENGINE_FAILED = "engine_failed"
    """The model's engines have failed to start, a while ago."""
