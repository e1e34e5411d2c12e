"""The queue: requests of one model that wait in one ingress. Pure: the time is passed in.

Each method handles one event (a request joins, a slot frees, time passes) and returns the requests
that no longer wait because of it.

Requests are served by tier, then fairly by tenant, then by arrival. Fairness follows VTC (Sheng et
al., "Fairness in Serving Large Language Models", OSDI 2024). Inside a tier, the tenant that was
given the fewest tokens comes first. A tenant that returns after idling is lifted to the lowest
counter among the waiting tenants. Idle time thus neither earns credit nor costs anything.

A request that has not started in time is raised to a better tier (``raise_due``). From then on it
counts as if it had arrived at that tier when it did: in the order of its tenant's requests, for the
starvation guard, and in what the Model is told. Only its longest wait is the longer one of the two
tiers, so that no request is shed because it was raised.

With n waiting requests, every operation takes O(log n) or O(1) time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from app.flow.deadlines import Deadlines
from app.flow.lane import Lane
from app.flow.request import QueuedRequest

Room = Callable[[QueuedRequest], bool]
"""Whether a slot is free that this request, and any other of its tier and needs, may use."""

RaiseTo = Callable[[QueuedRequest], Tier | None]
"""The better tier that a request is raised to now; ``None`` if it stays where it is. It is the same
for all requests of one tier and route with the same ``raise_to`` and ``raise_only``."""

_TIERS = tuple(Tier)


class RequestQueue:
    """Waiting requests of one model in one ingress.

    The queue never grants by itself. Its owner calls ``take`` whenever a slot may be free.

    Attributes:
        settings: the model's queue settings.
        count: how many requests wait.
    """

    def __init__(self, settings: QueueSettings) -> None:
        self.settings = settings
        self._bounds = settings.bounds(slots=0, ingresses=1)
        self._reserved = settings.reserved(slots=0, ingresses=1)
        self._lanes = {tier: Lane() for tier in _TIERS}
        self._rates = {tier: GrantRate(settings.drain_window_s) for tier in _TIERS}
        self._deadlines = Deadlines()
        self.count = 0
        self._numbers = 0
        self._large = 0
        self._passed_over = 0

    def configure(self, settings: QueueSettings, *, slots: int, ingresses: int) -> None:
        """Apply changed settings, or another number of slots or ingresses.

        Longest waits apply to waiting requests too; a shorter queue applies to new requests only.
        """
        if settings.drain_window_s != self.settings.drain_window_s:
            self._rates = {tier: GrantRate(settings.drain_window_s) for tier in _TIERS}
        self.settings = settings
        self._bounds = settings.bounds(slots=slots, ingresses=ingresses)
        self._reserved = settings.reserved(slots=slots, ingresses=ingresses)

    def resize(self, slots_of: Callable[[QueuedRequest], int]) -> None:
        """Work out anew how many slots the waiting requests take; ``slots_of`` tells."""
        self._large = 0
        for lane in self._lanes.values():
            lane.slots = 0
            for request in lane:
                request.slots = slots_of(request)
                self._large += request.slots > 1
                lane.slots += request.slots

    def waiting(self, tier: Tier) -> int:
        """Return how many requests wait at a tier."""
        return self._lanes[tier].count

    def oldest_s(self, tier: Tier, now: float) -> float:
        """Return how long the oldest waiting request of a tier has waited; 0 if none waits."""
        oldest = self._lanes[tier].oldest
        return 0.0 if oldest is None else max(0.0, now - oldest.since)

    def wanted(self, tier: Tier) -> int:
        """Return how many slots the waiting requests of a tier would take."""
        return self._lanes[tier].slots

    def starving(self, now: float) -> int:
        """Return how many slots the requests would take that wait in lower tiers that starve."""
        lower = (tier for tier in _TIERS[1:] if self._overdue_s(tier, now) >= 0)
        return sum(self.wanted(tier) for tier in lower)

    def next_large(self, now: float) -> tuple[QueuedRequest, bool] | None:
        """Return the next request if it takes several slots, and whether it is next by starving.

        It is next if it comes first in the highest tier that waits, or if it starves and its turn
        has come.
        """
        if not self._large:
            return None
        if self._passed_over >= self.settings.starvation_every - 1:
            overdue = self._most_overdue(now)
            if overdue is not None and overdue.slots > 1:
                return overdue, True
        lane = next(lane for lane in self._lanes.values() if lane.count)
        head = lane.first(lambda _: True)
        assert head is not None, "a request waits in this lane"
        return (head, False) if head.slots > 1 else None

    def join(self, request: QueuedRequest, now: float) -> QueuedRequest | None:
        """Add a request to the queue, and return the request to shed because of it, if any.

        If the queue is full, the newest request of the lowest tier below the new one's is
        displaced. If there is none, the new request itself is shed. Two exceptions hold however
        full the queue is. Requests within their tier's reserved number are admitted, and are not
        displaced. A replay is always admitted, at the front of its tenant's requests, because it
        has been admitted before.
        """
        displaced: QueuedRequest | None = None
        if self.count >= self._bounds[request.tier] and not request.replayed:
            displaced = self._newest_below(request.tier)
            if displaced is not None:
                self.leave(displaced)
            elif self.waiting(request.tier) >= self._reserved[request.tier]:
                return request
        self._number(request)
        request.since = now
        self._add(request)
        return displaced

    def leave(self, request: QueuedRequest) -> None:
        """Remove a waiting request from the queue."""
        self._lanes[request.tier].remove(request)
        self._deadlines.remove(request)
        self.count -= 1
        self._large -= request.slots > 1

    def raise_due(
        self, now: float, raise_to: RaiseTo, slots_of: Callable[[QueuedRequest], int]
    ) -> bool:
        """Raise the waiting requests that have not started in time; return whether any was raised.

        A request stays where it is while the queue is full for the better tier and the request
        waits in a reserved place of its own tier; otherwise it takes the place that it gives up. No
        request is displaced for it. It is tried again with each call.

        Args:
            now: the time, in seconds.
            raise_to: returns the tier that a request is raised to.
            slots_of: returns how many slots it would take at its present tier.
        """
        raised = False
        for request in self._deadlines.due(now):
            tier = raise_to(request)
            if tier is None or not self._has_place(request, tier):
                continue
            self.leave(request)
            request.raised_from, request.tier = request.tier, tier
            request.slots = slots_of(request)
            self._add(request)
            raised = True
        return raised

    def next_raise(self) -> float:
        """Return when the next request is to be raised, not counting those that had to stay."""
        return self._deadlines.next_at()

    def take(self, room: Room, starving_room: Room, now: float) -> QueuedRequest | None:
        """Remove and return the next request for which a slot is free; ``None`` if there is none.

        Starvation guard: a lower tier is starving once its oldest request has waited for the
        starvation age. That request is then next after every ``starvation_every - 1`` grants to
        higher tiers. If several tiers are starving, the request furthest past its starvation age
        is served.

        Args:
            room: whether a slot is free for a request served in turn.
            starving_room: the same for a request served out of turn.
            now: the time, in seconds.
        """
        if not self.count:
            return None
        starving = self._starving_one(starving_room, now)
        request = starving or self._first(room)
        if request is not None:
            self.leave(request)
            self.granted(request, now)
        if starving is not None:
            # One that takes several slots has had the next turns too.
            self._passed_over = (1 - starving.slots) * self.settings.starvation_every
        return request

    def granted(self, request: QueuedRequest, now: float) -> None:
        """Count a request that has received a slot, from the queue or without waiting."""
        self._number(request)
        self._lanes[request.tier].charge(request.tenant, 0 if request.replayed else request.tokens)
        self._rates[request.tier].count(now)
        if not self.count:
            self._passed_over = 0
            return
        starving = self._most_overdue(now)
        if starving is None:
            self._passed_over = 0
        elif request.tier.rank < starving.tier.rank:
            self._passed_over += 1

    def settle(self, request: QueuedRequest, tokens: int) -> None:
        """Correct a tenant's counter once the tokens that a request really used are known."""
        if tokens != request.tokens:
            self._lanes[request.tier].charge(request.tenant, tokens - request.tokens, served=False)

    def expire(self, now: float) -> Iterator[QueuedRequest]:
        """Remove and yield the requests that have waited for their tier's longest wait.

        For a raised request that is the longer one of the tier's and of that where it arrived.
        """
        for tier in _TIERS:
            while (oldest := self._expired(tier, now)) is not None:
                self.leave(oldest)
                yield oldest

    def clear(self) -> Iterator[QueuedRequest]:
        """Remove and yield every waiting request."""
        for lane in self._lanes.values():
            while (oldest := lane.oldest) is not None:
                self.leave(oldest)
                yield oldest

    def next_expiry(self) -> float:
        """Return the time at which the next request expires; infinity if none waits."""
        if not self.count:
            return math.inf
        return min(
            (
                oldest.since + self._longest_wait_s(oldest)
                for lane in self._lanes.values()
                for oldest in lane.heads()
            ),
            default=math.inf,
        )

    def grant_rate(self, tier: Tier, now: float) -> float:
        """Return how many requests of a tier per second have received a slot recently."""
        return self._rates[tier].per_second(now)

    def retry_after(self, tier: Tier, now: float) -> float:
        """Return after how many seconds a retry at this tier may succeed.

        By then, the requests ahead of it will have received slots, at the recent rate of grants
        to its tier and higher ones. At least ``min_retry_after_s``; at most
        ``max_retry_after_s``, which also applies if nothing was granted.
        """
        tiers = _TIERS[: tier.rank + 1]
        rate = sum(self.grant_rate(one, now) for one in tiers)
        ahead = sum(self.waiting(one) for one in tiers) + 1
        longest = self.settings.max_retry_after_s
        seconds = ahead / rate if rate * longest > ahead else longest
        return max(self.settings.min_retry_after_s, seconds)

    def _add(self, request: QueuedRequest) -> None:
        self._lanes[request.tier].add(request)
        self._deadlines.add(request)
        self.count += 1
        self._large += request.slots > 1

    def _has_place(self, request: QueuedRequest, tier: Tier) -> bool:
        """Return whether a waiting request has a place at a better tier; see ``raise_due``."""
        return (
            # It counts itself.
            self.count <= self._bounds[tier]
            or self.waiting(request.tier) > self._reserved[request.tier]
            or self.waiting(tier) < self._reserved[tier]
        )

    def _expired(self, tier: Tier, now: float) -> QueuedRequest | None:
        heads = self._lanes[tier].heads()
        late = (one for one in heads if now - one.since >= self._longest_wait_s(one))
        return next(late, None)

    def _longest_wait_s(self, request: QueuedRequest) -> float:
        limit = self.settings.of(request.tier).max_wait_s
        if request.raised_from is None:
            return limit
        return max(limit, self.settings.of(request.raised_from).max_wait_s)

    def _number(self, request: QueuedRequest) -> None:
        if not request.number:
            self._numbers += 1
            request.number = self._numbers

    def _newest_below(self, tier: Tier) -> QueuedRequest | None:
        for lower in reversed(_TIERS[tier.rank + 1 :]):
            if self.waiting(lower) <= self._reserved[lower]:
                continue
            # Replays stay: they were admitted before.
            if (request := self._lanes[lower].newest()) is not None:
                return request
        return None

    def _first(self, room: Room) -> QueuedRequest | None:
        for tier in _TIERS:
            request = self._lanes[tier].first(room)
            if request is not None:
                return request
        return None

    def _starving_one(self, room: Room, now: float) -> QueuedRequest | None:
        if self._passed_over < self.settings.starvation_every - 1:
            return None
        request = self._most_overdue(now)
        return request if request is not None and room(request) else None

    def _most_overdue(self, now: float) -> QueuedRequest | None:
        overdue_s, tier = max((self._overdue_s(tier, now), tier) for tier in _TIERS[1:])
        return self._lanes[tier].oldest if overdue_s >= 0 else None

    def _overdue_s(self, tier: Tier, now: float) -> float:
        oldest = self._lanes[tier].oldest
        if oldest is None:
            return -math.inf
        return now - oldest.since - self.settings.of(tier).starvation_age_s


class GrantRate:
    """The recent rate of grants per second, as an exponentially weighted mean.

    A grant counts 1/window when it happens, and decays with e^(-age/window). The mean thus falls
    towards 0 while nothing is granted. During the first window, the rate is measured over the time
    that has really passed.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._weight = 0.0
        self._began = math.inf
        self._last = 0.0

    def count(self, now: float) -> None:
        """Count a grant."""
        if self._began == math.inf:
            self._began = self._last = now
        self._weight = self._weight * math.exp((self._last - now) / self._window_s) + 1.0
        self._last = now

    def per_second(self, now: float) -> float:
        """Return the rate; 0 before the first grant."""
        if self._began == math.inf:
            return 0.0
        faded = self._weight * math.exp((self._last - now) / self._window_s)
        # At least one second: a first burst is not a rate.
        seen = -math.expm1(-max(now - self._began, 1.0) / self._window_s)
        return faded / (self._window_s * seen)
