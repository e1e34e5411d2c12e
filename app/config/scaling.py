"""Settings of autoscaling: how many replicas a model gets."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class ScalingSettings(Settings):
    """``scaling`` in a Model's ``user_config``. Changes need no restart.

    The bounds of each pool are Serve's own ``min_replicas`` and ``max_replicas``.
    """

    priority_wait_probability: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Share of priority requests that may find no free slot. With one in a "
        "hundred, the 99th percentile of their time to first token depends on the engine only. A "
        "queueing formula computes the slots from it.",
    )
    default_wait_s: float = Field(
        default=30.0,
        gt=0,
        description="Average time that default requests may wait in the queue, in seconds. Half a "
        "minute lets bursts of default use idle slots, and is a quarter of the longest wait in "
        "the queue.",
    )
    smoothing_s: float = Field(
        default=60.0,
        gt=0,
        description="Shortest window over which arrival rates are measured, in seconds. The "
        "window grows up to twentyfold where engines start slowly or few requests arrive, but not "
        "back beyond a clear change of the rate. A sudden rise of priority counts at once.",
    )
    priority_memory_s: float = Field(
        default=3600.0,
        ge=0,
        description="How long priority keeps the slots that it has needed, in seconds, but at "
        "most thirty times an engine's start time. A burst that recurs within the hour may be "
        "over before a new engine is ready, unless engines start in seconds.",
    )
    scale_down_after_s: float = Field(
        default=120.0,
        ge=0,
        description="How long a replica must have been unneeded before it is stopped, in seconds, "
        "and at least as long as an engine takes to start: stopping one that is needed again "
        "costs a start. Two minutes outlast the pauses of ordinary traffic. A "
        "policy that has just started stops nothing for two and a half times as long.",
    )
    sleep_after_s: float = Field(
        default=600.0,
        ge=0,
        description="How long a model must have had no requests before its last replica is "
        "stopped, in seconds, where `min_replicas: 0` allows that. Ten minutes, because the first "
        "request afterwards waits for an engine to start.",
    )
    flex_replicas: int = Field(
        default=1,
        ge=0,
        description="How many replicas flex alone may keep running. Flex fills idle slots and "
        "does not scale up. One, so that a sleeping model answers flex requests too.",
    )
    flex_extra_replicas: int = Field(
        default=0,
        ge=0,
        description="How many replicas may be added to those that priority and default need, so "
        "that flex waits five minutes or less on average. None, because flex's lower price is for "
        "idle slots. Under steady load these are few, and most flex requests are shed.",
    )
