"""Computes the slots that would have served the bursts of the last minutes in time. Pure.

A burst that is shorter than a start is over before new replicas are ready: only slots that are
there serve it. If such bursts come every few minutes, the fleet must not shrink to what the time
between them needs. So the recent past is played to a fleet that never has fewer than some slots,
and follows the load only as late as the scaler can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def slots_for(
    loads: Sequence[float], *, bin_s: float, late_s: float, wait_s: float, before: int = 0
) -> int:
    """Return the fewest slots with which requests would have waited ``wait_s`` on average.

    Args:
        loads: the load that arrived, in slots that it keeps busy, by time, the oldest first.
        bin_s: the time that each of them covers, in seconds.
        late_s: how long after a load more slots for it are there, in seconds.
        wait_s: the average wait allowed, in seconds.
        before: how many of the first loads are only what the fleet followed at first: nobody of
            them waits.
    """
    few, many = -1, math.ceil(max(loads[before:], default=0.0))
    late = max(1, math.ceil(late_s / bin_s))
    while many - few > 1:
        middle = (few + many) // 2
        waited_s = mean_wait_s(
            loads, middle, bin_s=bin_s, late=late, within_s=wait_s + late_s, before=before
        )
        if waited_s <= wait_s:
            many = middle
        else:
            few = middle
    return many


def mean_wait_s(
    loads: Sequence[float], slots: int, *, bin_s: float, late: int, within_s: float, before: int = 0
) -> float:
    """Return the average wait of what arrives, in seconds; infinity if nothing is ever served.

    Args:
        loads, bin_s, before: as of ``slots_for``.
        slots: how many there are at least. ``late`` steps later there are as many as a load needs,
            and as work off what waited then within ``within_s``.
        late: see ``slots``.
        within_s: see ``slots``, in seconds.
    """
    waited, backlogs = 0.0, [0.0] * len(loads)
    backlog = 0.0
    for index in range(before, len(loads)):
        load, here = loads[index], float(slots)
        if index >= late:
            then = index - late
            here = max(here, loads[then] + backlogs[then] / within_s)
        earlier, backlog = backlog, max(0.0, backlog + (load - here) * bin_s)
        backlogs[index] = backlog
        if backlog or earlier:
            if here <= 0:
                return math.inf
            # What arrives waits for what is there before it.
            waited += load * (earlier + backlog) / 2 / here
    total = sum(loads[before:])
    return waited / total if total else 0.0
