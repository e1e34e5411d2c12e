"""One tier's part of a queue: its waiting requests, and the counters of its tenants. Pure.

A request that was raised to the tier keeps the time of its arrival and its number. It is therefore
kept apart from those that joined the tier, which are in order by themselves.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from sortedcontainers import SortedList

from app.core.tiers import Tier
from app.flow.request import QueuedRequest

_FORGET_EVERY = 1024
_Key = tuple[float, int]


class Lane:
    """The waiting requests of one tier, and the counters of its tenants.

    Attributes:
        count: how many requests wait.
        slots: how many slots they would take.
    """

    def __init__(self) -> None:
        self.count = 0
        self.slots = 0
        # By the time at which they began to wait, replays included; those that were raised by the
        # tier that they came from.
        self._waiting: OrderedDict[QueuedRequest, None] = OrderedDict()
        self._raised: dict[Tier, SortedList[tuple[float, int, QueuedRequest]]] = {}
        self._queues: dict[Hashable, _Line] = {}
        self._counters: dict[str, float] = {}
        # Counter that new tenants are lifted to while no request waits. It never falls.
        self._floor = 0.0
        self._forget_at = _FORGET_EVERY

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Yield all requests."""
        yield from self._waiting
        for line in self._raised.values():
            yield from (request for _, _, request in line)

    @property
    def oldest(self) -> QueuedRequest | None:
        """The request that has waited longest; ``None`` if none waits."""
        if not self._raised:
            return next(iter(self._waiting), None)
        return min(self.heads(), key=lambda request: (request.since, request.number))

    def heads(self) -> Iterator[QueuedRequest]:
        """Yield the oldest request of those that joined, and of those from each other tier."""
        if self._waiting:
            yield next(iter(self._waiting))
        for line in self._raised.values():
            yield line[0][2]

    def newest(self) -> QueuedRequest | None:
        """Return the request that came last and is no replay; ``None`` if there is none."""
        # Replays number at most a replica's slots.
        own = next((one for one in reversed(self._waiting) if not one.replayed), None)
        lasts = [own] if own is not None else []
        lasts += (line[-1][2] for line in self._raised.values())
        return max(lasts, key=lambda request: (request.since, request.number), default=None)

    def add(self, request: QueuedRequest) -> None:
        """Add a request; its tenant is lifted if no other request of it waits."""
        tenant = request.tenant
        if not self._waits(tenant):
            lift = self._least() if self._queues else self._floor
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), lift)
        queue = self._queues.get(request.needs)
        if queue is None:
            queue = self._queues[request.needs] = _Line()
        queue.add(request, self._counters[tenant])
        if (origin := _origin(request)) is None:
            self._waiting[request] = None
        else:
            self._raised.setdefault(origin, SortedList()).add(_aged(request))
        self.count += 1
        self.slots += request.slots

    def remove(self, request: QueuedRequest) -> None:
        """Remove a request."""
        if (origin := _origin(request)) is None:
            del self._waiting[request]
        else:
            line = self._raised[origin]
            line.remove(_aged(request))
            if not line:
                del self._raised[origin]
        self.count -= 1
        self.slots -= request.slots
        queue = self._queues[request.needs]
        queue.remove(request, self._counters[request.tenant])
        if queue.is_empty:
            del self._queues[request.needs]

    def first(self, room: Callable[[QueuedRequest], bool]) -> QueuedRequest | None:
        """Return the next request in turn for which a slot is free."""
        heads = (queue.head for queue in self._queues.values())
        usable = [(key, request) for key, request in heads if room(request)]
        # Keys end in the request's number, which is unique.
        return min(usable)[1] if usable else None

    def charge(self, tenant: str, tokens: int, *, served: bool = True) -> None:
        """Add to a tenant's counter; ``served``: it has just received a slot."""
        counter = self._counters.get(tenant, 0.0)
        if not self._queues:
            self._counters[tenant] = counter = max(counter, self._floor) + tokens
            if served:
                # No request is left waiting: all tenants restart from the one served last.
                self._floor = max(self._floor, counter)
        else:
            if counter < self._floor and not self._waits(tenant):
                counter = self._floor
            if served:
                self._floor = max(self._floor, min(counter, self._least()))
            self._counters[tenant] = counter = counter + tokens
            for queue in self._queues.values():
                queue.recount(tenant, counter)
        if len(self._counters) >= self._forget_at:
            self._forget()

    def _waits(self, tenant: str) -> bool:
        return any(queue.has(tenant) for queue in self._queues.values())

    def _least(self) -> float:
        """Return the lowest counter of a waiting tenant; infinity if no request waits."""
        if not self._queues:
            return math.inf
        return min(queue.head[0][0] for queue in self._queues.values())

    def _forget(self) -> None:
        """Drop idle tenants that would be lifted anyway. Runs rarely, so its cost is small."""
        self._counters = {
            tenant: counter
            for tenant, counter in self._counters.items()
            if counter > self._floor or self._waits(tenant)
        }
        self._forget_at = 2 * len(self._counters) + _FORGET_EVERY


class _Line:
    """Waiting requests of one tier that can use the same slots, by tenant, then arrival."""

    def __init__(self) -> None:
        self._requests: dict[str, OrderedDict[QueuedRequest, None]] = {}
        self._raised: dict[str, SortedList[tuple[int, QueuedRequest]]] = {}
        self._keys: dict[str, _Key] = {}
        self._order: SortedList[tuple[float, int, str]] = SortedList()

    @property
    def head(self) -> tuple[_Key, QueuedRequest]:
        counter, number, tenant = self._order[0]
        first = self._first(tenant)
        assert first is not None, "only tenants that wait have a place in the order"
        return (counter, number), first

    @property
    def is_empty(self) -> bool:
        return not self._order

    def has(self, tenant: str) -> bool:
        return tenant in self._keys

    def add(self, request: QueuedRequest, counter: float) -> None:
        if _origin(request) is not None:
            raised = self._raised.setdefault(request.tenant, SortedList())
            raised.add((request.number, request))
            self.recount(request.tenant, counter)
            return
        requests = self._requests.get(request.tenant)
        if requests is None:
            requests = self._requests[request.tenant] = OrderedDict()
        requests[request] = None
        if request.replayed:
            requests.move_to_end(request, last=False)
        self.recount(request.tenant, counter)

    def remove(self, request: QueuedRequest, counter: float) -> None:
        if _origin(request) is not None:
            raised = self._raised[request.tenant]
            raised.remove((request.number, request))
            if not raised:
                del self._raised[request.tenant]
        else:
            requests = self._requests[request.tenant]
            del requests[request]
            if not requests:
                del self._requests[request.tenant]
        self.recount(request.tenant, counter)

    def recount(self, tenant: str, counter: float) -> None:
        """Reorder a tenant after its counter or its first request has changed."""
        first = self._first(tenant)
        key = None if first is None else (counter, first.number)
        old = self._keys.get(tenant)
        if key == old:
            return
        if old is not None:
            self._order.remove((*old, tenant))
            del self._keys[tenant]
        if key is not None:
            self._order.add((*key, tenant))
            self._keys[tenant] = key

    def _first(self, tenant: str) -> QueuedRequest | None:
        """Return a tenant's next request: a replay, else the one that arrived first."""
        requests = self._requests.get(tenant)
        first = None if requests is None else next(iter(requests))
        raised = self._raised.get(tenant)
        if raised is None:
            return first
        number, request = raised[0]
        keeps = first is not None and (first.replayed or first.number < number)
        return first if keeps else request


def _origin(request: QueuedRequest) -> Tier | None:
    """Return the tier that a request was raised from; ``None`` for one in order of joining.

    A raised request that is replayed is in that order again: it begins to wait anew.
    """
    return None if request.replayed else request.raised_from


def _aged(request: QueuedRequest) -> tuple[float, int, QueuedRequest]:
    return request.since, request.number, request
