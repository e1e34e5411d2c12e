"""The scheduler of one model in one ingress: which requests get slots. Pure.

Each method handles one event (arrival, completion, grant) and returns the waiting requests whose
state it changed; they are now PLACED or SHED. The time is passed in.

After every event this holds: **no request waits while a slot is free that it may use.** A new
request that finds room is therefore placed at once, even if others wait: none of them can use that
slot. New capacity serves the backlog, whether it is a slot, a credit or a replica.

A request of several sequences takes as many slots of one replica. Once such a request is next and
no replica has so many, it gathers them on one: slots that become free there are not given to
requests of its tier or below. While it starves and its turn has come, nor to any others.

A finished request frees its slot on one path only: ``end``. It may be called in any state, and
repeated calls have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from app.config.queue import QueueSettings
from app.contracts.credits import Demand, Gathers, Grant
from app.core.shed_reason import ShedReason
from app.core.tiers import PriorityMode, Tier
from app.flow.credits import Credits
from app.flow.queue import RequestQueue
from app.flow.replica_slots import ReplicaSlots
from app.flow.request import QueuedRequest, RequestState
from app.flow.slots import Offer
from app.flow.weight import weight

SUSPENSION_S = 2.0
"""How long nothing is placed on a replica after its engine could not be reached, in seconds. Longer
than a Model takes to detect a dead engine; short if the engine was only briefly unreachable."""

GIVE_UP_S = 10.0
"""How long requests keep waiting once no node offers what the model's engines require, in seconds.
Nodes are checked every two seconds, so neither one failed check nor a node that restarts at once
sheds a request."""

# If an engine takes longer to start than last time, a further tenth is expected, repeatedly.
_OVERDUE = 0.1
_PLACED = RequestState.PLACED
_WAITING = RequestState.WAITING


class Gathering(NamedTuple):
    """A large request that is next, and the replica on which it gathers slots.

    Attributes:
        request: the request.
        replica_id: the replica.
        alone: whether no other request gets slots there, of whatever tier.
    """

    request: QueuedRequest
    replica_id: str
    alone: bool

    def keeps_out(self, other: QueuedRequest) -> bool:
        """Whether another request gets no slots on the replica."""
        first = self.request
        return other is not first and (self.alone or other.tier.rank >= first.tier.rank)


class Scheduler:
    """Admits the requests of one model in one ingress.

    Attributes:
        queue: the requests that wait.
        credits: its credits, and the slots that they give.
        gathering: the large request that gathers slots now; ``None`` if there is none.
    """

    def __init__(self, ingress: str, settings: QueueSettings) -> None:
        self.queue = RequestQueue(settings)
        self.credits = Credits(ingress)
        # Waiting requests whose replica failed; some may have been placed since.
        self._replays: set[QueuedRequest] = set()
        # Seconds until an engine is ready, as a function of the time; ``None``: not asleep.
        self._opens: Callable[[float], float] | None = None
        # When waiting requests are shed because no node fits an engine; infinity: not planned.
        self._gives_up_at = math.inf
        self._gives_up_for = ShedReason.NOT_OFFERED
        self.gathering: Gathering | None = None
        self._slot_table = self.credits.slot_table
        self._slot_table.slack = settings.affinity_slack
        # The slots that one request can take, by tier.
        self._most = dict.fromkeys(Tier, 1)

    def arrive(self, request: QueuedRequest, now: float) -> list[QueuedRequest]:
        """Admit a new request: it is PLACED, WAITING or SHED when this returns.

        Returns other requests whose state changed.
        """
        assert request.state is RequestState.NEW, "a request arrives once"
        changed = self._advance(now)
        request.arrived = now
        if request.tier is Tier.PRIORITY and not self.delivers_priority(request.route):
            request.tier = Tier.DEFAULT
        return self._admit(request, now, changed)

    def delivers_priority(self, route: Hashable) -> bool:
        """Whether priority can be delivered on a route, as far as is known."""
        return self._slot_table.delivers(route)

    def end(
        self, request: QueuedRequest, now: float, tokens: int | None = None
    ) -> list[QueuedRequest]:
        """End a request that has finished, failed or lost its client, in any state.

        Args:
            request: a waiting one leaves the queue, a placed one frees its slot; in other states
                nothing happens.
            now: the time, in seconds.
            tokens: how many tokens it really used, prompt and answer together; ``None`` if
                unknown, and the estimate is kept.
        """
        changed = self._advance(now)
        self._replays.discard(request)
        if request.state is _WAITING:
            self.queue.leave(request)
        elif request.state is _PLACED:
            self.credits.release(request.replica_id, request.tier, request.slots)
            if tokens is not None:
                self.queue.settle(request, tokens)
        else:
            return changed
        request.state = RequestState.ENDED
        return self._dispatch(now, changed)

    def lost(
        self, request: QueuedRequest, now: float, *, suspend: bool = True
    ) -> list[QueuedRequest]:
        """Admit a placed request again because its replica failed.

        The request goes to another replica at once, or to the front of its tenant's requests in
        the queue, however full the queue is, because it has been admitted before. It is shed if
        there is no other replica and a new request would not wait for one either. A waiting replay
        is shed as soon as that becomes true.

        Args:
            request: the placed request.
            now: the time, in seconds.
            suspend: the replica could not be reached: place nothing there for ``SUSPENSION_S``.

        Returns other requests whose state changed.
        """
        assert request.state is _PLACED, "only a placed request can lose its replica"
        changed = self._advance(now)
        if suspend:
            self._slot_table.suspend(request.replica_id, now + SUSPENSION_S)
        self.credits.release(request.replica_id, request.tier, request.slots)
        request.without |= {request.replica_id}
        request.replayed = True
        return self._admit(request, now, changed)

    def set_replicas(
        self, offers: Iterable[Offer], mode: PriorityMode, now: float
    ) -> list[QueuedRequest]:
        """Apply which replicas are ready, and when the model delivers priority."""
        self.credits.set_replicas(offers, mode)
        self._configure(self.queue.settings)
        changed = self._shed_stranded(now)
        return self._dispatch(now, changed + self._advance(now))

    def sleep(self, start_s: float | None, since: float | None) -> None:
        """Record that the model has no engine, and that a waiting request starts one.

        Requests shed meanwhile get the time until the engine is ready as their ``Retry-After``.

        Args:
            start_s: how long an engine takes to start, in seconds; ``None`` if unknown.
            since: when it began to start; ``None`` if it has not begun.
        """

        def opens_in(now: float) -> float:
            if start_s is None:
                return math.inf
            left = start_s if since is None else start_s - (now - since)
            # An engine that takes longer than last time may be ready at any moment.
            return max(left, _OVERDUE * start_s)

        self._opens = opens_in

    def wake(self) -> None:
        """Record that the model is not asleep."""
        self._opens = None

    def withdraw(self, now: float, reason: ShedReason = ShedReason.NOT_OFFERED) -> None:
        """Record that no engine can be expected, and why. Idempotent.

        Requests wait for ``GIVE_UP_S`` from the first call on; the latest reason is theirs.
        """
        self._gives_up_for = reason
        if self._gives_up_at == math.inf:
            self._gives_up_at = now + GIVE_UP_S

    def offer(self) -> None:
        """Record that there are nodes for the model's engines, or may be."""
        self._gives_up_at = math.inf

    def configure(self, settings: QueueSettings, now: float) -> list[QueuedRequest]:
        """Apply changed settings."""
        self._configure(settings)
        return self._dispatch(now, self._advance(now))

    def tick(self, now: float) -> list[QueuedRequest]:
        """Apply the passing of time.

        Waits and suspensions end, requests begin to starve, and those that have not started in time
        are raised to a better tier.
        """
        return self._dispatch(now, self._advance(now))

    def next_tick(self) -> float:
        """Return when ``tick`` is next due; infinity if never. Later events may bring it forward.

        A request that begins to starve takes effect at the next event, and needs no tick.
        """
        opens_at = self.credits.next_change()
        if not self.queue.count:
            return opens_at
        queue = self.queue
        return min(queue.next_expiry(), queue.next_raise(), opens_at, self._gives_up_at)

    def renewal_at(self) -> float:
        """Return when the next demand is due; an event may bring it forward."""
        waits = self.queue.count > 0
        priority_waits = waits and self.queue.waiting(Tier.PRIORITY) > 0
        return self.credits.renewal_at(waits=waits, priority_waits=priority_waits)

    def demand(self, now: float) -> Demand:
        """Return the demand to send to the Model now."""
        queue = self.queue
        return self.credits.demand(
            now,
            waiting={tier: queue.wanted(tier) for tier in Tier},
            oldest_s={tier: queue.oldest_s(tier, now) for tier in Tier},
            starving=queue.starving(now),
            gathers=self._gathers(),
        )

    def receive(self, grant: Grant, now: float) -> list[QueuedRequest]:
        """Apply a grant from the Model."""
        before = self.credits.ingresses, self._slot_table.headroom
        self.credits.receive(grant, now)
        if (self.credits.ingresses, self._slot_table.headroom) != before:
            self._configure(self.queue.settings)
        return self._dispatch(now, self._advance(now))

    def renewal_failed(self, demand: Demand, now: float) -> list[QueuedRequest]:
        """Record that a demand could not be delivered; see ``Credits.renewal_failed``."""
        self.credits.renewal_failed(demand, now)
        return self._dispatch(now, self._advance(now))

    def _configure(self, settings: QueueSettings) -> None:
        slots = sum(replica.slots for replica in self._slot_table if replica.present)
        self.queue.configure(settings, slots=slots, ingresses=self.credits.ingresses)
        self._slot_table.slack = settings.affinity_slack
        self._slot_table.keep_headroom(everywhere=settings.headroom_everywhere)
        most = self._slot_table.most_slots(settings.headroom_of)
        if most != self._most:
            self._most = most
            self.queue.resize(self._slots_of)

    def _advance(self, now: float) -> list[QueuedRequest]:
        """Bring the state up to ``now``, as a tick would, before an event is handled."""
        changed: list[QueuedRequest] = []
        # First, because suspensions that end may let priority be delivered.
        opened = self.credits.advance(now)
        raised = False
        if self.queue.count:
            # Before longest waits are applied: a better tier may have a longer one.
            raised = self.queue.raise_due(now, self._raise_to, self._slots_of)
            for request in self.queue.expire(now):
                self._shed(request, ShedReason.WAITED_TOO_LONG, now)
                changed.append(request)
            if now >= self._gives_up_at:
                for request in self.queue.clear():
                    self._shed(request, self._gives_up_for, now)
                    changed.append(request)
        if opened or raised:
            self._dispatch(now, changed)
        return changed

    def _raise_to(self, request: QueuedRequest) -> Tier | None:
        """Return the better tier that a request is raised to now; ``None``: it stays."""
        tier = request.raise_to
        if tier is Tier.PRIORITY and not self.delivers_priority(request.route):
            if request.raise_only:
                return None
            tier = Tier.DEFAULT
        return tier if tier.rank < request.tier.rank else None

    def _admit(
        self, request: QueuedRequest, now: float, changed: list[QueuedRequest]
    ) -> list[QueuedRequest]:
        """Place a request if there is room for it, else queue it or shed it."""
        if self._place(request, now):
            self.queue.granted(request, now)
            # It may have been the last grant before a starving request's turn.
            return self._dispatch(now, changed)
        reason = self._refusal(request, now)
        if reason is not None:
            self._shed(request, reason, now)
            # A replay has left a slot, which others may use.
            return self._dispatch(now, changed) if request.replayed else changed
        if request.replayed:
            self._replays.add(request)
        request.slots = self._slots_of(request)
        request.needs = (request.route, request.without, request.sequences)
        request.state = _WAITING
        shed = self.queue.join(request, now)
        if shed is request:
            self._shed(request, ShedReason.QUEUE_FULL, now)
        elif shed is not None:
            self._shed(shed, ShedReason.DISPLACED, now)
            changed.append(shed)
        quiet = request.slots == 1 and shed is None and self.gathering is None
        if quiet and not request.replayed:
            return changed
        # Another large request may be next now, or none; or a replay has left a slot to others.
        self._dispatch(now, changed)
        # It may have been placed after all, which is no change of another request.
        return [one for one in changed if one is not request]

    def _refusal(self, request: QueuedRequest, now: float) -> ShedReason | None:
        """Return why a request without room may not wait; ``None`` if it may."""
        if now >= self._gives_up_at:
            return self._gives_up_for
        if self._is_stranded(request):
            return ShedReason.NO_OTHER_REPLICA
        return ShedReason.FAIL_FAST if request.fail_fast else None

    def _is_stranded(self, request: QueuedRequest) -> bool:
        """Whether every replica has failed this request, and no other is expected.

        A sleeping model wakes for a waiting request. Any other model without a replica may have
        failed.
        """
        if not request.without or self._opens is not None:
            return False
        return not any(
            replica.present and replica.replica_id not in request.without
            for replica in self._slot_table
        )

    def _shed_stranded(self, now: float) -> list[QueuedRequest]:
        """Shed the waiting requests that no replica can serve any more; return them."""
        self._replays = {request for request in self._replays if request.state is _WAITING}
        stranded = [request for request in self._replays if self._is_stranded(request)]
        for request in stranded:
            self.queue.leave(request)
            self._shed(request, ShedReason.NO_OTHER_REPLICA, now)
        return stranded

    def _dispatch(self, now: float, changed: list[QueuedRequest]) -> list[QueuedRequest]:
        """Place waiting requests while there is room for any, and append them to ``changed``."""
        queue = self.queue
        if not queue.count and self.gathering is None:
            return changed
        while True:
            while queue.count and self._slot_table.has_room:
                request = queue.take(self._has_room, self._has_room_out_of_turn, now)
                if request is None:
                    break
                placed = self._place(request, now) or self._place(request, now, out_of_turn=True)
                assert placed, "a request is taken out of the queue only if there is room for it"
                changed.append(request)
            before, self.gathering = self.gathering, self._gather(now)
            gathering = self.gathering
            self._slot_table.gathered = None if gathering is None else gathering.replica_id
            # Slots that are not gathered any more are for others.
            if before is None or before == self.gathering:
                return changed

    def _gather(self, now: float) -> Gathering | None:
        """Return which large request gathers slots now, and where; ``None`` if none is next."""
        found = self.queue.next_large(now)
        if found is None:
            return None
        request, alone = found
        before = self.gathering
        able = self._slot_table.able(request.tier, request.route, request.without, request.slots)
        same = before.replica_id if before is not None and before.request is request else None
        if any(replica.replica_id == same for replica in able):
            assert same is not None
            return Gathering(request, same, alone)
        rank = request.tier.rank
        best = max(able, key=lambda one: (one.room[rank], one.credit, one.replica_id), default=None)
        return None if best is None else Gathering(request, best.replica_id, alone)

    def _gathers(self) -> Gathers | None:
        """Return where slots are gathered, as the Model needs it."""
        gathering = self.gathering
        if gathering is None:
            return None
        request = gathering.request
        replica = self._slot_table[gathering.replica_id]
        slots = request.slots + self._slot_table.headroom_lacking_beside(replica, request.tier)
        return Gathers(gathering.replica_id, slots, request.tier, gathering.alone)

    def _place(self, request: QueuedRequest, now: float, *, out_of_turn: bool = False) -> bool:
        replica = self._find(request, prefix=request.prefix, out_of_turn=out_of_turn)
        if replica is None:
            return False
        request.slots = self._slots_of(request)
        self.credits.occupy(replica, request.tier, request.slots)
        request.replica_id = replica.replica_id
        request.placed = now
        request.state = _PLACED
        return True

    def _find(
        self, request: QueuedRequest, *, prefix: int | None = None, out_of_turn: bool = False
    ) -> ReplicaSlots | None:
        gathering = self.gathering
        held_back = None
        if gathering is not None and gathering.keeps_out(request):
            # A replica may just have gone. Then nothing is gathered there any more.
            gone = self._slot_table.get(gathering.replica_id) is None
            held_back = None if gone else gathering.replica_id
        return self._slot_table.find(
            request.tier,
            request.route,
            prefix=prefix,
            without=request.without,
            held_back=held_back,
            out_of_turn=out_of_turn,
            slots=self._slots_of(request),
        )

    def _slots_of(self, request: QueuedRequest) -> int:
        """Return how many slots a request takes on a replica."""
        if request.sequences == 1:
            return 1
        settings, most = self.queue.settings, self._most[request.tier]
        return weight(request.sequences, request.route, settings, most)

    def _has_room(self, request: QueuedRequest) -> bool:
        return self._find(request) is not None

    def _has_room_out_of_turn(self, request: QueuedRequest) -> bool:
        return self._find(request, out_of_turn=True) is not None

    def _shed(self, request: QueuedRequest, reason: ShedReason, now: float) -> None:
        request.state = RequestState.SHED
        request.shed = reason
        request.retry_after_s = self._retry_after(request.tier, now)

    def _retry_after(self, tier: Tier, now: float) -> float:
        if self._opens is None:
            return self.queue.retry_after(tier, now)
        settings = self.queue.settings
        longest = max(settings.min_retry_after_s, settings.max_retry_after_s)
        return min(max(self._opens(now), settings.min_retry_after_s), longest)
