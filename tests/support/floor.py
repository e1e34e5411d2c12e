"""A scheduler with replicas, a Model that grants whatever a test says, and a clock."""

import math

from app.config.queue import QueueSettings
from app.contracts.credits import Grant
from app.core.tiers import PriorityMode, Tier
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import Scheduler
from app.flow.slots import Offer

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
CHAT, EMBED = "chat", "embeddings"
EVERYWHERE = frozenset({CHAT, EMBED})
NEW, WAITING, PLACED, SHED, ENDED = RequestState


class Floor:
    """A scheduler and what surrounds it: replicas, a Model that grants at will, and a clock."""

    def __init__(self, mode=PriorityMode.AUTO, **values):
        self.scheduler = Scheduler("ingress", QueueSettings.load(values, "queue"))
        self.now = 0.0
        self.mode = mode
        self.offers = {}
        self.grants = 0
        self.told, self.told_at = None, -math.inf

    def demand(self):
        demand = self.scheduler.demand(self.now)
        self.told = (demand.number, demand.held, demand.running, demand.waiting)
        self.told_at = self.now
        return demand

    def add(self, replica_id, credit, *, routes=EVERYWHERE, pool="pool", slots=8, preempts=False):
        offer = Offer(replica_id, pool, slots, frozenset(routes), preempts=preempts)
        self.offers[replica_id] = offer
        called = self.set_replicas()
        return called + self.grant({replica_id: credit})

    def set_replicas(self):
        return self.scheduler.set_replicas(self.offers.values(), self.mode, self.now)

    def grant(self, added=(), headroom=None, at_most=(), **more):
        self.grants += 1
        number = self.demand().number
        grant = Grant(
            "model", self.grants, number, self.now, headroom=headroom,
            added=dict(added), at_most=dict(at_most), **more,
        )  # fmt: skip
        return self.scheduler.receive(grant, self.now)

    def arrive(self, tier=D, *, tenant="a", tokens=10, route=CHAT, **more):
        request = QueuedRequest(tier, tenant, tokens, route, **more)
        return request, self.scheduler.arrive(request, self.now)

    def place(self, *args, **more):
        request, called = self.arrive(*args, **more)
        assert request.state is PLACED and not called
        return request

    def wait(self, *args, **more):
        request, called = self.arrive(*args, **more)
        assert request.state is WAITING and not called
        return request

    def end(self, request, tokens=None):
        return self.scheduler.end(request, self.now, tokens)
