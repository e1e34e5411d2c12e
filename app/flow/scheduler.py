"""The scheduler of one model in one ingress: which requests get slots. Pure.

The time is passed in. Events go in; out come the requests that are called by it: waiting ones that
are now placed or shed, as their ``state`` says. After every event this holds: **no request waits
while a slot is free that it may use.** So a newcomer that finds room is placed at once, whoever
else waits: nobody else can use that slot. And new capacity takes the backlog, whether it comes as a
slot, a credit or a replica.

A request's slot comes free on one path only, ``end``, which may be called in any state, and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from app.config.queue import QueueSettings
from app.contracts.credits import Demand, Grant
from app.core.shed_reason import ShedReason
from app.core.tiers import PriorityMode, Tier
from app.flow.credits import Credits
from app.flow.queue import RequestQueue
from app.flow.request import QueuedRequest, RequestState
from app.flow.slots import Offer

SUSPENSION_S = 2.0
"""How long nothing is placed on a replica after its engine could not be reached: longer than it
takes a model to notice that an engine has died, short for one that only hiccuped."""

GIVE_UP_S = 10.0
"""How long who waits goes on waiting once no node offers what the model's engines ask for. Whether
one does is looked at every two seconds: neither one bad look nor a node that is started anew at
once turns anybody away."""

# An engine that takes longer to start than the last time is given a tenth more, again and again.
_OVERDUE = 0.1
_PLACED = RequestState.PLACED
_WAITING = RequestState.WAITING


class Scheduler:
    """Admits the requests of one model in one ingress."""

    def __init__(self, ingress: str, settings: QueueSettings) -> None:
        self.queue = RequestQueue(settings)
        self.credits = Credits(ingress)
        # Waiting requests that a replica has failed; some may have been placed since.
        self._replays: set[QueuedRequest] = set()
        # When an engine will be ready, where the model rests until then; ``None`` if it does not.
        self._opens: Callable[[float], float] | None = None
        # When whoever waits is turned away, as there is no node for an engine.
        self._gives_up_at = math.inf
        self._slot_table = self.credits.slot_table
        self._slot_table.slack = settings.affinity_slack

    def arrive(self, request: QueuedRequest, now: float) -> list[QueuedRequest]:
        """Admit a new request: its request is placed, waiting or shed when this returns.

        The returned requests are other requests that were called.
        """
        assert request.state is RequestState.NEW, "a request arrives once"
        called = self._advance(now)
        request.arrived = now
        if request.tier is Tier.PRIORITY and not self._slot_table.delivers(request.route):
            request.tier = Tier.DEFAULT
        return self._admit(request, now, called)

    def end(
        self, request: QueuedRequest, now: float, tokens: int | None = None
    ) -> list[QueuedRequest]:
        """Let go of a request that has finished, failed or lost its client, in whatever state.

        Args:
            request: a waiting one leaves the queue, a placed one frees its slot; for others
                nothing happens.
            now: seconds.
            tokens: how many tokens it really took, prompt and answer together; ``None`` if
                nobody knows, and what was expected stands.
        """
        called = self._advance(now)
        self._replays.discard(request)
        if request.state is _WAITING:
            self.queue.leave(request)
        elif request.state is _PLACED:
            self.credits.release(request.replica_id, request.tier)
            if tokens is not None:
                self.queue.settle(request, tokens)
        else:
            return called
        request.state = RequestState.ENDED
        return self._dispatch(now, called)

    def lost(
        self, request: QueuedRequest, now: float, *, suspend: bool = True
    ) -> list[QueuedRequest]:
        """Admit a placed request again because its replica failed it.

        The request goes to another replica at once, or to the front of its tenant's requests in
        the queue; however full that is, as it has been admitted. It is shed where there is no other
        replica and a newcomer would not wait for one either; so it is later, once that is so. With
        ``suspend``, where the replica could not be reached, nothing more is placed there for
        ``SUSPENSION_S``. The returned requests are other requests that were called.
        """
        assert request.state is _PLACED, "only a placed request can lose its replica"
        called = self._advance(now)
        if suspend:
            self._slot_table.suspend(request.replica_id, now + SUSPENSION_S)
        self.credits.release(request.replica_id, request.tier)
        request.without |= {request.replica_id}
        request.replayed = True
        return self._admit(request, now, called)

    def set_replicas(
        self, offers: Iterable[Offer], mode: PriorityMode, now: float
    ) -> list[QueuedRequest]:
        """Take over which replicas are ready, and when the model delivers priority."""
        self.credits.set_replicas(offers, mode)
        self._configure(self.queue.settings)
        called = self._shed_stranded(now)
        return self._dispatch(now, called + self._advance(now))

    def sleep(self, start_s: float | None, since: float | None) -> None:
        """Note that the model has no engine, and that one starts as soon as somebody waits.

        Those who are turned away meanwhile are told when it will be ready.

        Args:
            start_s: how long an engine takes to start; ``None`` if nobody knows.
            since: when it began to; ``None`` if it has not begun.
        """

        def opens_in(now: float) -> float:
            if start_s is None:
                return math.inf
            left = start_s if since is None else start_s - (now - since)
            # One that takes longer than the last time may be ready at any moment.
            return max(left, _OVERDUE * start_s)

        self._opens = opens_in

    def wake(self) -> None:
        """Note that the model is not asleep."""
        self._opens = None

    def withdraw(self, now: float) -> None:
        """Note that no node offers what the model's engines ask for; again has no effect."""
        if self._gives_up_at == math.inf:
            self._gives_up_at = now + GIVE_UP_S

    def offer(self) -> None:
        """Note that there are nodes for the model's engines, or may be."""
        self._gives_up_at = math.inf

    def configure(self, settings: QueueSettings, now: float) -> list[QueuedRequest]:
        """Take over changed settings."""
        self._configure(settings)
        return self._dispatch(now, self._advance(now))

    def tick(self, now: float) -> list[QueuedRequest]:
        """Let time pass: waits and suspensions end, and requests begin to starve."""
        return self._dispatch(now, self._advance(now))

    def next_tick(self) -> float:
        """Return when ``tick`` has something to do; infinity if never. Later events may advance it.

        A request that begins to starve is seen at the next event, and needs no tick.
        """
        gives_up_at = self._gives_up_at if self.queue.count else math.inf
        return min(self.queue.next_expiry(), self.credits.next_change(), gives_up_at)

    def renewal_at(self) -> float:
        """Return when the next demand is due; an event may advance it."""
        return self.credits.renewal_at(
            waits=self.queue.count > 0, priority_waits=self.queue.waiting(Tier.PRIORITY) > 0
        )

    def demand(self, now: float) -> Demand:
        """Return the demand to send to the Model now."""
        queue = self.queue
        return self.credits.demand(
            now,
            waiting={tier: queue.waiting(tier) for tier in Tier},
            oldest_s={tier: queue.oldest_s(tier, now) for tier in Tier},
            starving=queue.starving(now),
        )

    def receive(self, grant: Grant, now: float) -> list[QueuedRequest]:
        """Take a grant from the Model."""
        ingresses = self.credits.ingresses
        self.credits.receive(grant, now)
        if self.credits.ingresses != ingresses:
            self._configure(self.queue.settings)
        return self._dispatch(now, self._advance(now))

    def renewal_failed(self, demand: Demand, now: float) -> list[QueuedRequest]:
        """Note that a demand could not be delivered; see ``Credits.renewal_failed``."""
        self.credits.renewal_failed(demand, now)
        return self._dispatch(now, self._advance(now))

    def _configure(self, settings: QueueSettings) -> None:
        slots = sum(place.slots for place in self._slot_table if place.present)
        self.queue.configure(settings, slots=slots, ingresses=self.credits.ingresses)
        self._slot_table.slack = settings.affinity_slack

    def _advance(self, now: float) -> list[QueuedRequest]:
        """Bring everything up to date, so that the event finds what a tick would have left."""
        called: list[QueuedRequest] = []
        if self.queue.count:
            for request in self.queue.expire(now):
                self._shed(request, ShedReason.WAITED_TOO_LONG, now)
                called.append(request)
            if now >= self._gives_up_at:
                for request in self.queue.clear():
                    self._shed(request, ShedReason.NOT_OFFERED, now)
                    called.append(request)
        if self.credits.advance(now):
            self._dispatch(now, called)
        return called

    def _admit(
        self, request: QueuedRequest, now: float, called: list[QueuedRequest]
    ) -> list[QueuedRequest]:
        """Place a request where there is room for it, or let it wait, or shed it."""
        if self._place(request, now):
            self.queue.granted(request, now)
            # It may have been the last one before a starving request's turn.
            return self._dispatch(now, called)
        reason = self._refusal(request, now)
        if reason is not None:
            self._shed(request, reason, now)
            return called
        if request.replayed:
            self._replays.add(request)
        request.needs = (request.route if request.tier is Tier.PRIORITY else None, request.without)
        request.state = _WAITING
        loser = self.queue.join(request, now)
        if loser is request:
            self._shed(request, ShedReason.QUEUE_FULL, now)
        elif loser is not None:
            self._shed(loser, ShedReason.DISPLACED, now)
            called.append(loser)
        return called

    def _refusal(self, request: QueuedRequest, now: float) -> ShedReason | None:
        """Return why a request for which there is no room may not wait, if it may not."""
        if now >= self._gives_up_at:
            return ShedReason.NOT_OFFERED
        if self._is_stranded(request):
            return ShedReason.NO_OTHER_REPLICA
        return ShedReason.FAIL_FAST if request.fail_fast else None

    def _is_stranded(self, request: QueuedRequest) -> bool:
        """Whether every replica has failed a request, and none is about to come.

        A model that rests wakes for whoever waits; any other without a replica may have failed.
        """
        if not request.without or self._opens is not None:
            return False
        return not any(
            place.present and place.replica_id not in request.without for place in self._slot_table
        )

    def _shed_stranded(self, now: float) -> list[QueuedRequest]:
        """Turn away the waiting requests that no replica can take any more; return them."""
        self._replays = {request for request in self._replays if request.state is _WAITING}
        stranded = [request for request in self._replays if self._is_stranded(request)]
        for request in stranded:
            self.queue.leave(request)
            self._shed(request, ShedReason.NO_OTHER_REPLICA, now)
        return stranded

    def _dispatch(self, now: float, called: list[QueuedRequest]) -> list[QueuedRequest]:
        """Place waiting requests while there is room for any of them, and add them to called."""
        queue = self.queue
        while queue.count and self._slot_table.free:
            request = queue.take(self._has_room, self._has_room_out_of_turn, now)
            if request is None:
                break
            placed = self._place(request, now) or self._place(request, now, out_of_turn=True)
            assert placed, "a request is taken out of the queue only if there is room for it"
            called.append(request)
        return called

    def _place(self, request: QueuedRequest, now: float, *, out_of_turn: bool = False) -> bool:
        place = self._slot_table.find(
            request.tier,
            request.route,
            prefix=request.prefix,
            without=request.without,
            out_of_turn=out_of_turn,
        )
        if place is None:
            return False
        self.credits.occupy(place, request.tier)
        request.replica_id = place.replica_id
        request.placed = now
        request.state = _PLACED
        return True

    def _has_room(self, request: QueuedRequest) -> bool:
        table = self._slot_table
        return table.find(request.tier, request.route, without=request.without) is not None

    def _has_room_out_of_turn(self, request: QueuedRequest) -> bool:
        place = self._slot_table.find(
            request.tier, request.route, without=request.without, out_of_turn=True
        )
        return place is not None

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
