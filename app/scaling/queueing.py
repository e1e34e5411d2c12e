"""What a request of either class meets at a pool of slots, some of which only priority may use.

The model is the multi-server cutoff-priority queue: n servers, arrivals of two classes, each a
Poisson stream, exponential service with one mean. The lower class is served only while fewer than
n - h servers are busy, the upper one while fewer than n are; whoever is not served waits. That is
what the queue does with its headroom h. (I. D. S. Taylor, J. G. C. Templeton: Waiting Time in a
Multi-Server Cutoff-Priority Queue, and Its Application to an Urban Ambulance Service, Operations
Research 28 (5), 1980.) Loads are in Erlangs: arrival rate times mean service time, which is how
many slots they would keep busy for ever. With h = 0 the formulas come down to Erlang's C.

Everything sums positive terms only, so nothing cancels; it takes about the square root of n steps.
"""

from __future__ import annotations

from dataclasses import dataclass

_NEGLIGIBLE = 1e-15
_HUGE = 1e15


def erlang_b(servers: int, load: float) -> float:
    """Return the probability that all servers are busy where nobody waits (Erlang's B).

    From 1/B = sum over i of n! / ((n-i)! a^i), by D. L. Jagerman (Some Properties of the Erlang
    Loss Function, Bell System Technical Journal 53, 1974), cut off where terms do not count any
    more.
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
    """What a pool of slots is like to those who arrive.

    Attributes:
        priority_waits: the probability that a priority request finds no free slot.
        others_wait: the probability that another request finds none that it may use.
        spare: how many more slots' worth of load would be served in the long run before the queue
            of the others grows without end; 0 or less where it does already.
    """

    priority_waits: float
    others_wait: float
    spare: float


def crowd(slots: int, headroom: int, priority: float, others: float) -> Crowd:
    """Return what requests meet at a pool.

    Args:
        slots: all of them, at least 1.
        headroom: how many only priority may use; less than ``slots``.
        priority: the load of priority requests, in Erlangs.
        others: the load of all others.
    """
    load, cutoff = priority + others, slots - headroom
    if priority >= slots:
        return Crowd(1.0, 1.0, slots - load)
    all_busy, busy_above = _above(slots, cutoff, priority)
    # The mean number of busy servers is the load, whatever the order of service. It is a mixture
    # of what it is below the cutoff and above it, which gives the part of the time spent above.
    if load >= busy_above:
        return Crowd(all_busy, 1.0, busy_above - load)
    busy_below = load * (1.0 - erlang_b(cutoff - 1, load))
    above = (load - busy_below) / (busy_above - busy_below)
    above = min(1.0, max(0.0, above))
    return Crowd(above * all_busy, above, busy_above - load)


def _above(slots: int, cutoff: int, priority: float) -> tuple[float, float]:
    """Return what holds while at least ``cutoff`` servers are busy.

    That is the probability that all are, and the mean number that are: in these states only
    priority is let in, so each is a birth and death of priority load alone.
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
