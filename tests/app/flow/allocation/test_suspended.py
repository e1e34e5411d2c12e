"""Lower tiers get on (promise 7): ingresses, a Model and an engine that preempts without bounds."""

import pytest
from hypothesis import example, given, settings
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
STEP_S = 0.05
WORK_S = 1.0
AGES_S = {D: 3.0, F: 6.0}
ROUTES = frozenset({"chat"})


class World:
    """Ingresses in front of one engine, which always runs the best requests that it has.

    That is SGLang's order: by tier, then by arrival, however often a request is suspended. Each
    request needs a slot for ``WORK_S`` in all.
    """

    def __init__(self, ingresses, slots, every):
        tiers = {
            tier.value: {"starvation_age_s": age_s, "max_wait_s": 1e6}
            for tier, age_s in AGES_S.items()
        }
        values = {"starvation_every": every, "priority": {"max_wait_s": 1e6}, **tiers}
        queue = QueueSettings.load(values, "queue")
        self.now, self.slots = 0.0, slots
        self.allocator = CreditAllocator("model", queue, 0.0)
        self.allocator.set_replicas([Capacity("a", "pool", slots, True, True)])
        self.ingresses = [Scheduler(f"i{n}", queue) for n in range(ingresses)]
        for one in self.ingresses:
            one.set_replicas(
                [Offer("a", "pool", slots, ROUTES, preempts=True)], PriorityMode.AUTO, 0.0
            )
        self.live = []
        self.done_s = {}
        self.run(2 * SILENCE_S)

    def ask(self, ingress, tier):
        request = QueuedRequest(tier, "tenant", 10, "chat")
        self.ingresses[ingress].arrive(request, self.now)
        self.live.append((request, self.ingresses[ingress]))
        self.done_s[request] = 0.0
        return request

    def step(self):
        self.now += STEP_S
        inside = [r for r, _ in self.live if r.state is RequestState.PLACED]
        for request in sorted(inside, key=lambda r: (r.tier.rank, r.placed))[: self.slots]:
            self.done_s[request] += STEP_S
        for request, one in list(self.live):
            if self.done_s[request] >= WORK_S:
                self.live.remove((request, one))
                one.end(request, self.now)
        woken = self.allocator.wakeups(self.now)
        for number, one in enumerate(self.ingresses):
            one.tick(self.now)
            if f"i{number}" in woken or one.renewal_at() <= self.now:
                one.receive(self.allocator.renew(one.demand(self.now), self.now), self.now)

    def run(self, seconds, flooded=(), until=lambda: False):
        """Step through time, with priority always waiting at some ingresses."""
        end = self.now + seconds
        while self.now < end and not until():
            for number in flooded:
                while self.ingresses[number].queue.waiting(P) < 2:
                    self.ask(number, P)
            self.step()


def have_ended(requests):
    return all(request.state is RequestState.ENDED for request in requests)


@settings(max_examples=10, deadline=None)
@given(
    ingresses=st.integers(1, 3),
    slots=st.integers(1, 8),
    every=st.sampled_from([2, 4, 10]),
    tiers=st.lists(st.sampled_from([D, F]), min_size=1, max_size=8),
)
# Between two priority requests there are always gaps of a moment.
@example(ingresses=2, slots=8, every=2, tiers=[D, F, D])
def test_whoever_was_running_when_a_flood_of_priority_began_gets_on(ingresses, slots, every, tiers):
    world = World(ingresses, slots, every)
    last = ingresses - 1
    lower = [world.ask(last, tier) for tier in tiers[:slots]]
    world.run(2.0, until=lambda: all(one.state is not RequestState.WAITING for one in lower))
    # One slot at least is theirs once they have been suspended for their age, one after the other.
    longest_s = AGES_S[F] + len(lower) * (WORK_S + 2 * SILENCE_S)
    world.run(longest_s, flooded=range(ingresses), until=lambda: have_ended(lower))
    assert have_ended(lower)


@pytest.mark.parametrize("tier", [D, F])
def test_whoever_waits_in_the_queue_meanwhile_gets_on(tier):
    world = World(2, 4, 4)
    world.run(5.0, flooded=(0, 1))
    waiting = world.ask(1, tier)
    assert waiting.state is RequestState.WAITING
    world.run(60.0, flooded=(0, 1), until=lambda: waiting.state is RequestState.ENDED)
    assert waiting.state is RequestState.ENDED


def test_priority_loses_no_more_than_its_part_to_them():
    world = World(1, 8, 4)
    lower = [world.ask(0, D) for _ in range(8)]
    world.run(STEP_S)
    before = world.now
    world.run(20.0, flooded=(0,), until=lambda: have_ended(lower))
    served_s = sum(done_s for request, done_s in world.done_s.items() if request.tier is P)
    assert served_s >= 0.74 * 8 * (world.now - before) - 8 * WORK_S
