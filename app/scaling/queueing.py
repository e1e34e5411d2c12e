"""Waiting probabilities at a pool of slots, some of which only priority may use.

The model is the multi-server cutoff-priority queue: n servers, arrivals of two classes, each a
Poisson stream, exponential service with one mean. The lower class is served only while fewer than
n - h servers are busy, the upper one while fewer than n are; other requests wait. That is how the
queue treats its headroom h. (I. D. S. Taylor, J. G. C. Templeton: Waiting Time in a
Multi-Server Cutoff-Priority Queue, and Its Application to an Urban Ambulance Service, Operations
Research 28 (5), 1980.) Loads are in Erlangs: arrival rate times mean service time, which is how
many slots they keep busy in the long run. With h = 0 the formulas reduce to Erlang's C.

All sums have positive terms only, so nothing cancels. They take about the square root of n steps.
"""

from __future__ import annotations

from dataclasses import dataclass

_NEGLIGIBLE = 1e-15
_HUGE = 1e15


def erlang_b(servers: int, load: float) -> float:
    """Return the probability that all servers are busy in a system without a queue (Erlang's B).

    From 1/B = sum over i of n! / ((n-i)! a^i), by D. L. Jagerman (Some Properties of the Erlang
    Loss Function, Bell System Technical Journal 53, 1974), cut off once terms are negligible.
    """
    if load <= 0:
        return 1.0 if servers == 0 else 0.0
    inverse = term = 1.0
    for busy in range(servers, 0, -1):
        term *= busy / load
        inverse += term
        if term < _NEGLIGIBLE * inverse or inverse > _HUGE:
            break
    return 1.0 / inverse


@dataclass(frozen=True, slots=True)
class Crowd:
    """What arriving requests find at a pool of slots.

    Attributes:
        priority_waits: the probability that a priority request finds no free slot.
        others_wait: the probability that another request finds no free slot that it may use.
        spare: how much more load could be served, in slots, before the queue of the others grows
            without bound; 0 or less if it already does.
    """

    priority_waits: float
    others_wait: float
    spare: float


def crowd(slots: int, headroom: int, priority: float, others: float) -> Crowd:
    """Return what arriving requests find at a pool.

    Args:
        slots: all slots of the pool, at least 1.
        headroom: how many of them only priority may use; less than ``slots``.
        priority: the load of priority requests, in Erlangs.
        others: the load of all other requests, in Erlangs.
    """
    load, cutoff = priority + others, slots - headroom
    if priority >= slots:
        return Crowd(1.0, 1.0, slots - load)
    all_busy, busy_above = _above(slots, cutoff, priority)
    # The mean number of busy servers is the load, whatever the order of service. It is a mixture of
    # the means below and above the cutoff, which yields the share of time spent above.
    if load >= busy_above:
        return Crowd(all_busy, 1.0, busy_above - load)
    busy_below = load * (1.0 - erlang_b(cutoff - 1, load))
    above = (load - busy_below) / (busy_above - busy_below)
    above = min(1.0, max(0.0, above))
    return Crowd(above * all_busy, above, busy_above - load)


def _above(slots: int, cutoff: int, priority: float) -> tuple[float, float]:
    """Return two figures of the states in which at least ``cutoff`` servers are busy.

    They are the probability that all servers are busy, and the mean number of busy servers. In
    these states only priority is admitted, so they form a birth-death process of priority load.
    """
    weight, total, busy = 1.0, 0.0, 0.0
    for state in range(cutoff, slots):
        total += weight
        busy += weight * state
        weight *= priority / (state + 1)
        if weight < _NEGLIGIBLE * total:
            weight = 0.0
            break
    tail = weight / (1.0 - priority / slots)
    return tail / (total + tail), (busy + tail * slots) / (total + tail)
