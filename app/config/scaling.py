"""How many replicas a model gets, as its operator set it."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class ScalingSettings(Settings):
    """``scaling`` in a Model's ``user_config``. Changes need no restart.

    The bounds of each pool are Serve's own ``min_replicas`` and
    ``max_replicas``.
    """

    priority_wait_probability: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Which part of the priority requests may find no free slot. One in a hundred "
        "leaves the 99th percentile of their first token to the engine. A queueing formula makes "
        "slots of it.",
    )
    default_wait_s: float = Field(
        default=30.0,
        gt=0,
        description="How long default requests may wait in the queue, in seconds, on the "
        "average. Half a minute lets bursts of default use what is idle, and is a quarter of the "
        "longest wait in the queue.",
    )
    smoothing_s: float = Field(
        default=60.0,
        gt=0,
        description="Over how many seconds arrival rates are measured, at least; over up to twenty "
        "times as many where engines start slowly or few requests come, though not back beyond a "
        "clear change. A sudden rise of priority is seen at once all the same.",
    )
    priority_memory_s: float = Field(
        default=3600.0,
        ge=0,
        description="For how long priority keeps the slots that it has needed, in seconds, or for "
        "thirty times an engine's start, if that is shorter: a burst that comes again within the "
        "hour may be over before a new engine is ready, unless that starts in seconds.",
    )
    scale_down_after_s: float = Field(
        default=120.0,
        ge=0,
        description="How long a replica must have been needless before it is stopped, in seconds; "
        "longer where engines take longer to start, since stopping one that is wanted back costs "
        "a start. Two minutes outlast the pauses of ordinary traffic.",
    )
    sleep_after_s: float = Field(
        default=600.0,
        ge=0,
        description="How long nobody must have asked before the last replica is stopped, in "
        "seconds, where `min_replicas: 0` allows that. Ten minutes, as the first request "
        "afterwards waits for an engine to start.",
    )
    flex_replicas: int = Field(
        default=1,
        ge=0,
        description="How many replicas flex alone may keep running: it fills what is idle, and "
        "does not scale up. One, so that a model that sleeps answers flex requests too.",
    )
    flex_extra_replicas: int = Field(
        default=0,
        ge=0,
        description="How many replicas may be added to what priority and default need, so that "
        "flex waits for no longer than five minutes on the average. None, as its lower price is "
        "for what is idle; where load is steady that is little, and most of flex is turned away.",
    )
