"""What a Model tells an ingress of itself, for the board. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class PoolChange(NamedTuple):
    """What a decision of the autoscaling policy means for one pool."""

    before: int
    after: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """A decision of the autoscaling policy that has changed the number of replicas.

    Attributes:
        at: when, in Unix seconds.
        why: the reasons, in one line.
        pools: the pools that change.
    """

    at: float
    why: str
    pools: Mapping[str, PoolChange]


@dataclass(frozen=True, slots=True)
class ModelNews:
    """A model now, and a part of its history.

    Attributes:
        life: identifies the Model process; a restarted Model has another, and a new history.
        number: the number of the last point; to be passed to the next call.
        state: the model as it is now, as a JSON object (``app.history.state``).
        fine: points a second apart, as JSON rows, the oldest first (``Point.to_row``).
        coarse: the same, further apart.
    """

    life: str
    number: int
    state: bytes
    fine: tuple[bytes, ...]
    coarse: tuple[bytes, ...]
