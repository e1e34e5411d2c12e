"""The gate between the line and the slots of one model in one ingress. Pure: the time is passed in.

Events go in; out come the tickets that are called by it: waiting ones that are now placed or shed,
as their ``state`` says. After every event this holds: **no request waits while a slot is free that
it may use.** So a newcomer that finds room is placed at once, whoever else waits: nobody else can
use that slot. And new capacity takes the backlog, whether it comes as a slot, a credit or a
replica.

A ticket's slot comes free on one path only, ``end``, which may be called in any state, and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from app.config.queue import LineSettings
from app.core.tiers import PriorityMode, Tier
from app.flow.credits import Credits, Demand, Grant
from app.flow.queue import Line
from app.flow.request import ShedReason, Ticket, TicketState
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
_PLACED = TicketState.PLACED
_WAITING = TicketState.WAITING


class Gate:
    """Admits the requests of one model in one ingress."""

    def __init__(self, ingress: str, settings: LineSettings) -> None:
        self.line = Line(settings)
        self.credits = Credits(ingress)
        # Waiting requests that a replica has failed; some may have been placed since.
        self._replays: set[Ticket] = set()
        # When an engine will be ready, where the model rests until then; ``None`` if it does not.
        self._opens: Callable[[float], float] | None = None
        # When whoever waits is turned away, as there is no node for an engine.
        self._gives_up_at = math.inf
        self._places = self.credits.places
        self._places.slack = settings.affinity_slack

    def arrive(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Admit a new request: its ticket is placed, waiting or shed when this returns.

        The returned tickets are other requests that were called.
        """
        assert ticket.state is TicketState.NEW, "a ticket arrives once"
        called = self._advance(now)
        ticket.arrived = now
        if ticket.tier is Tier.PRIORITY and not self._places.delivers(ticket.route):
            ticket.tier = Tier.DEFAULT
        return self._admit(ticket, now, called)

    def end(self, ticket: Ticket, now: float, tokens: int | None = None) -> list[Ticket]:
        """Let go of a request that has finished, failed or lost its client, in whatever state.

        Args:
            ticket: a waiting one leaves the line, a placed one frees its slot; for others
                nothing happens.
            now: seconds.
            tokens: how many tokens it really took, prompt and answer together; ``None`` if
                nobody knows, and what was expected stands.
        """
        called = self._advance(now)
        self._replays.discard(ticket)
        if ticket.state is _WAITING:
            self.line.leave(ticket)
        elif ticket.state is _PLACED:
            self.credits.release(ticket.replica_id, ticket.tier)
            if tokens is not None:
                self.line.settle(ticket, tokens)
        else:
            return called
        ticket.state = TicketState.ENDED
        return self._dispatch(now, called)

    def lost(self, ticket: Ticket, now: float, *, suspend: bool = True) -> list[Ticket]:
        """Admit a placed request again because its replica failed it.

        The request goes to another replica at once, or to the front of its tenant's requests in
        the line; however full that is, as it has been admitted. It is shed where there is no other
        replica and a newcomer would not wait for one either; so it is later, once that is so. With
        ``suspend``, where the replica could not be reached, nothing more is placed there for
        ``SUSPENSION_S``. The returned tickets are other requests that were called.
        """
        assert ticket.state is _PLACED, "only a placed request can lose its replica"
        called = self._advance(now)
        if suspend:
            self._places.suspend(ticket.replica_id, now + SUSPENSION_S)
        self.credits.release(ticket.replica_id, ticket.tier)
        ticket.without |= {ticket.replica_id}
        ticket.replayed = True
        return self._admit(ticket, now, called)

    def set_replicas(self, offers: Iterable[Offer], mode: PriorityMode, now: float) -> list[Ticket]:
        """Take over which replicas are ready, and when the model delivers priority."""
        self.credits.set_replicas(offers, mode)
        self._configure(self.line.settings)
        called = self._shed_stranded(now)
        return self._dispatch(now, called + self._advance(now))

    def rest(self, start_s: float | None, since: float | None) -> None:
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
        """Note that the model does not rest."""
        self._opens = None

    def withdraw(self, now: float) -> None:
        """Note that no node offers what the model's engines ask for; again has no effect."""
        if self._gives_up_at == math.inf:
            self._gives_up_at = now + GIVE_UP_S

    def offer(self) -> None:
        """Note that there are nodes for the model's engines, or may be."""
        self._gives_up_at = math.inf

    def configure(self, settings: LineSettings, now: float) -> list[Ticket]:
        """Take over changed settings."""
        self._configure(settings)
        return self._dispatch(now, self._advance(now))

    def tick(self, now: float) -> list[Ticket]:
        """Let time pass: waits and suspensions end, and requests begin to starve."""
        return self._dispatch(now, self._advance(now))

    def next_tick(self) -> float:
        """Return when ``tick`` has something to do; infinity if never. Later events may advance it.

        A request that begins to starve is seen at the next event, and needs no tick.
        """
        gives_up_at = self._gives_up_at if self.line.count else math.inf
        return min(self.line.next_expiry(), self.credits.next_change(), gives_up_at)

    def renewal_at(self) -> float:
        """Return when the next demand is due; an event may advance it."""
        return self.credits.renewal_at(
            waits=self.line.count > 0, priority_waits=self.line.waiting(Tier.PRIORITY) > 0
        )

    def demand(self, now: float) -> Demand:
        """Return the demand to send to the Model now."""
        line = self.line
        return self.credits.demand(
            now,
            waiting={tier: line.waiting(tier) for tier in Tier},
            oldest_s={tier: line.oldest_s(tier, now) for tier in Tier},
            starving=line.starving(now),
        )

    def receive(self, grant: Grant, now: float) -> list[Ticket]:
        """Take a grant from the Model."""
        ingresses = self.credits.ingresses
        self.credits.receive(grant, now)
        if self.credits.ingresses != ingresses:
            self._configure(self.line.settings)
        return self._dispatch(now, self._advance(now))

    def renewal_failed(self, demand: Demand, now: float) -> list[Ticket]:
        """Note that a demand could not be delivered; see ``Credits.renewal_failed``."""
        self.credits.renewal_failed(demand, now)
        return self._dispatch(now, self._advance(now))

    def _configure(self, settings: LineSettings) -> None:
        slots = sum(place.slots for place in self._places if place.present)
        self.line.configure(settings, slots=slots, ingresses=self.credits.ingresses)
        self._places.slack = settings.affinity_slack

    def _advance(self, now: float) -> list[Ticket]:
        """Bring everything up to date, so that the event finds what a tick would have left."""
        called: list[Ticket] = []
        if self.line.count:
            for ticket in self.line.expire(now):
                self._shed(ticket, ShedReason.WAITED_TOO_LONG, now)
                called.append(ticket)
            if now >= self._gives_up_at:
                for ticket in self.line.clear():
                    self._shed(ticket, ShedReason.NOT_OFFERED, now)
                    called.append(ticket)
        if self.credits.advance(now):
            self._dispatch(now, called)
        return called

    def _admit(self, ticket: Ticket, now: float, called: list[Ticket]) -> list[Ticket]:
        """Place a request where there is room for it, or let it wait, or shed it."""
        if self._place(ticket, now):
            self.line.granted(ticket, now)
            # It may have been the last one before a starving request's turn.
            return self._dispatch(now, called)
        reason = self._refusal(ticket, now)
        if reason is not None:
            self._shed(ticket, reason, now)
            return called
        if ticket.replayed:
            self._replays.add(ticket)
        ticket.needs = (ticket.route if ticket.tier is Tier.PRIORITY else None, ticket.without)
        ticket.state = _WAITING
        loser = self.line.join(ticket, now)
        if loser is ticket:
            self._shed(ticket, ShedReason.LINE_FULL, now)
        elif loser is not None:
            self._shed(loser, ShedReason.DISPLACED, now)
            called.append(loser)
        return called

    def _refusal(self, ticket: Ticket, now: float) -> ShedReason | None:
        """Return why a request for which there is no room may not wait, if it may not."""
        if now >= self._gives_up_at:
            return ShedReason.NOT_OFFERED
        if self._is_stranded(ticket):
            return ShedReason.NO_OTHER_REPLICA
        return ShedReason.FAIL_FAST if ticket.fail_fast else None

    def _is_stranded(self, ticket: Ticket) -> bool:
        """Whether every replica has failed a request, and none is about to come.

        A model that rests wakes for whoever waits; any other without a replica may have failed.
        """
        if not ticket.without or self._opens is not None:
            return False
        return not any(
            place.present and place.replica_id not in ticket.without for place in self._places
        )

    def _shed_stranded(self, now: float) -> list[Ticket]:
        """Turn away the waiting requests that no replica can take any more; return them."""
        self._replays = {ticket for ticket in self._replays if ticket.state is _WAITING}
        stranded = [ticket for ticket in self._replays if self._is_stranded(ticket)]
        for ticket in stranded:
            self.line.leave(ticket)
            self._shed(ticket, ShedReason.NO_OTHER_REPLICA, now)
        return stranded

    def _dispatch(self, now: float, called: list[Ticket]) -> list[Ticket]:
        """Place waiting requests while there is room for any of them, and add them to called."""
        line = self.line
        while line.count and self._places.free:
            ticket = line.take(self._has_room, self._has_room_out_of_turn, now)
            if ticket is None:
                break
            placed = self._place(ticket, now) or self._place(ticket, now, out_of_turn=True)
            assert placed, "a request is taken out of the line only if there is room for it"
            called.append(ticket)
        return called

    def _place(self, ticket: Ticket, now: float, *, out_of_turn: bool = False) -> bool:
        place = self._places.find(
            ticket.tier,
            ticket.route,
            prefix=ticket.prefix,
            without=ticket.without,
            out_of_turn=out_of_turn,
        )
        if place is None:
            return False
        self.credits.occupy(place, ticket.tier)
        ticket.replica_id = place.replica_id
        ticket.placed = now
        ticket.state = _PLACED
        return True

    def _has_room(self, ticket: Ticket) -> bool:
        places = self._places
        return places.find(ticket.tier, ticket.route, without=ticket.without) is not None

    def _has_room_out_of_turn(self, ticket: Ticket) -> bool:
        place = self._places.find(
            ticket.tier, ticket.route, without=ticket.without, out_of_turn=True
        )
        return place is not None

    def _shed(self, ticket: Ticket, reason: ShedReason, now: float) -> None:
        ticket.state = TicketState.SHED
        ticket.shed = reason
        ticket.retry_after_s = self._retry_after(ticket.tier, now)

    def _retry_after(self, tier: Tier, now: float) -> float:
        if self._opens is None:
            return self.line.retry_after(tier, now)
        settings = self.line.settings
        longest = max(settings.min_retry_after_s, settings.max_retry_after_s)
        return min(max(self._opens(now), settings.min_retry_after_s), longest)
