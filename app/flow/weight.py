"""How many slots a request takes. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from app.config.queue import QueueSettings
from app.core.dialect import Route

# A tuple, because the scheduler takes any name of a route, which equals the member but has another
# hash.
_SHARE_SLOTS: Final = tuple(route for route in Route if route.takes_slot and not route.generates)


def weight(sequences: int, route: Hashable, settings: QueueSettings, slots: int) -> int:
    """Return how many slots of a replica a request takes; at least 1, at most all of them.

    Args:
        sequences: how many sequences the engine runs for it (``Inbound.sequences``).
        route: the route of the request. The inputs of one that generates nothing share slots.
        settings: the settings of the model's queue.
        slots: the slots of the replica.
    """
    if sequences <= 1:
        return 1
    if route in _SHARE_SLOTS:
        sequences = -(-sequences // settings.inputs_per_slot)
    return max(min(sequences, slots), 1)
