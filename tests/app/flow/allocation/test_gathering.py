"""Large requests among small ones: whole ingresses, a Model and engines, stepped through time."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config.queue import QueueSettings
from app.core.tiers import PriorityMode, Tier
from app.flow.allocation.allocator import Capacity, CreditAllocator
from app.flow.credits import SILENCE_S
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import Scheduler
from app.flow.slots import Offer

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
STEP_S = 0.025
AGE_S = 2.0


class World:
    """Ingresses that share replicas by way of a Model; each of them always has small requests."""

    def __init__(self, ingresses, replicas, slots, *, preempts=False, small=D, seed=0, **queue):
        self.random = random.Random(seed)
        young = {"starvation_age_s": AGE_S, "max_wait_s": 1e6}
        self.settings = QueueSettings.load(
            {"default": young, "flex": young, "priority": {"max_wait_s": 1e6}, **queue}, "queue"
        )
        self.now = 0.0
        self.small = small
        names = [f"r{n}" for n in range(replicas)]
        self.allocator = CreditAllocator("model", self.settings, 0.0)
        self.allocator.set_replicas(Capacity(n, "pool", slots, True, preempts) for n in names)
        offers = [Offer(n, "pool", slots, frozenset({"chat"}), preempts=preempts) for n in names]
        self.ingresses = {f"i{n}": Scheduler(f"i{n}", self.settings) for n in range(ingresses)}
        for one in self.ingresses.values():
            one.set_replicas(offers, PriorityMode.AUTO, 0.0)
        self.requests = {name: [] for name in self.ingresses}
        self.run(2 * SILENCE_S)

    def ask(self, name, tier, sequences=1):
        request = QueuedRequest(tier, "tenant", 10, "chat", sequences=sequences)
        self.ingresses[name].arrive(request, self.now)
        self.requests[name].append(request)
        return request

    def run(self, seconds, until=lambda: False):
        """Step through time; return whether the condition came true."""
        end = self.now + seconds
        while self.now < end and not until():
            self.now += STEP_S
            woken = self.allocator.wakeups(self.now)
            for name, one in self.ingresses.items():
                one.tick(self.now)
                self.end_some(name, one)
                while one.queue.waiting(self.small) < 3:
                    self.ask(name, self.small)
                if name in woken or one.renewal_at() <= self.now:
                    one.receive(self.allocator.renew(one.demand(self.now), self.now), self.now)
        return until()

    def end_some(self, name, one):
        """An answer takes half a second, give or take."""
        live = []
        for request in self.requests[name]:
            placed = request.state is RequestState.PLACED
            age_s = self.now - request.placed
            if placed and request.sequences == 1 and age_s > self.random.uniform(0.2, 0.8):
                one.end(request, self.now)
            elif request.state in (RequestState.PLACED, RequestState.WAITING):
                live.append(request)
        self.requests[name] = live


@settings(max_examples=12, deadline=None)
@given(
    ingresses=st.integers(1, 3),
    replicas=st.integers(1, 3),
    slots=st.sampled_from([1, 2, 8]),
    tiers=st.sampled_from([(D, D), (F, F), (P, P), (P, D), (D, F), (F, D), (F, P)]),
    sequences=st.sampled_from([2, 8, 24]),
    preempts=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_large_request_is_placed_however_many_small_ones_there_are(
    ingresses, replicas, slots, tiers, sequences, preempts, seed
):
    large, small = tiers
    world = World(ingresses, replicas, slots, preempts=preempts, small=small, seed=seed)
    request = world.ask("i0", large, sequences)
    # Its turn comes after the starvation age at the latest; then a replica has to run empty.
    assert world.run(AGE_S + 20.0, lambda: request.state is RequestState.PLACED)
    assert 1 <= request.slots <= min(sequences, slots)


def test_it_takes_as_many_slots_as_it_has_sequences_and_no_more_is_placed_there():
    world = World(1, 1, 8, small=F, headroom=0.0)
    request = world.ask("i0", D, 6)
    assert world.run(10.0, lambda: request.state is RequestState.PLACED)
    assert request.slots == 6
    place = world.ingresses["i0"].credits.slot_table["r0"]
    assert place.running <= 8
    world.run(2.0)
    assert place.running == 8 and place.taken == [0, 6, 2]


def test_two_large_requests_of_two_ingresses_do_not_keep_each_other_out():
    world = World(2, 1, 8, headroom=0.0)
    large = {name: world.ask(name, D, 8) for name in ("i0", "i1")}

    def placed():
        return [name for name, one in large.items() if one.state is RequestState.PLACED]

    while large:
        assert world.run(20.0, placed)
        for name in placed():
            world.ingresses[name].end(large.pop(name), world.now)


def test_priority_is_placed_at_once_while_flex_gathers():
    world = World(2, 1, 8, small=F)
    world.ask("i0", F, 8)
    world.run(0.5)
    priority = world.ask("i1", P)
    assert priority.state is RequestState.PLACED, "its headroom is left to it"
