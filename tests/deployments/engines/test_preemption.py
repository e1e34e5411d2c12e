"""Whom an engine suspends: the decision alone, and a long run of it in a small engine of values."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from frontline_preemption import (
    History,
    Rules,
    Running,
    Step,
    Waiting,
    choose_held,
    choose_victims,
)
from hypothesis import given
from hypothesis import strategies as st

from app.core.tiers import Tier
from deployments.engines.base import LOW_FIRST, PREEMPTION_MARGIN

pytestmark = pytest.mark.unit

TIERS = sorted(LOW_FIRST.values())
PRIORITY, DEFAULT, FLEX = TIERS
RULES = Rules()


def test_the_margin_separates_tiers_and_nothing_else():
    assert all(RULES.margin < lower - better for better, lower in pairwise(TIERS))
    assert RULES.margin == PREEMPTION_MARGIN > 0
    assert RULES.best_priority == LOW_FIRST[Tier.PRIORITY]


def running(priority, arrival=0.0, left=100, **more):
    return Running(priority, arrival, left, **more)


def choose(inside, waiting, *, slots=0, blocks=0, held=None, shared=None, rules=RULES):
    """``held``: the blocks of each running request; ``shared``: the references of some blocks."""
    holds = held or [()] * len(inside)
    return choose_victims(
        inside,
        waiting,
        free_slots=slots,
        free_blocks=blocks,
        blocks_of=lambda i: [(block, (shared or {}).get(block, 1)) for block in holds[i]],
        rules=rules,
    )


def test_the_worst_goes_and_of_equals_the_last_that_came():
    inside = [running(DEFAULT, 1), running(FLEX, 2), running(FLEX, 3), running(DEFAULT, 4)]
    burst = [Waiting(PRIORITY)] * 4
    assert choose(inside, burst[:1]) == [2]
    assert choose(inside, burst[:3]) == [2, 1, 3]
    assert choose(inside, burst) == [2, 1, 3, 0]
    assert choose(inside, burst, slots=3) == [2]


def test_where_there_is_room_nobody_goes():
    assert choose([running(FLEX)], [Waiting(PRIORITY, 5)], slots=1, blocks=5) == []


def test_cache_blocks_are_made_free_as_well():
    inside = [running(FLEX, 1), running(FLEX, 2), running(FLEX, 3)]
    held = [(1, 2, 3), (4,), (5, 6)]
    assert choose(inside, [Waiting(PRIORITY, 4)], slots=9, blocks=2, held=held) == [2]
    assert choose(inside, [Waiting(PRIORITY, 4)], slots=9, blocks=0, held=held) == [2, 0]
    assert choose(inside, [Waiting(PRIORITY, 7)], slots=9, blocks=0, held=held) == []


def test_a_block_is_free_only_when_all_that_share_it_have_gone():
    inside, held = [running(FLEX, 1), running(FLEX, 2)], [(1, 2), (1, 3)]
    waiting = [Waiting(PRIORITY, 3)]
    assert choose(inside, waiting, slots=9, held=held, shared={1: 2}) == [1, 0]
    assert choose(inside, waiting, slots=9, held=held, shared={1: 3}) == []


def test_who_goes_for_a_later_request_may_be_enough_for_an_earlier_one_too():
    """At 410afd7 the first went as well: [0, 1]."""
    inside = [running(FLEX, 2), running(FLEX, 1)]
    waiting = [Waiting(PRIORITY, 12), Waiting(PRIORITY, 1)]
    assert choose(inside, waiting[:1], slots=2, blocks=11, held=[{0}, {1, 2}]) == [0]
    assert choose(inside, waiting, slots=2, blocks=11, held=[{0}, {1, 2}]) == [1]


def test_whoever_is_first_in_line_and_gets_no_room_ends_the_search():
    # Otherwise the engine would give the room to the first, which it was not made for.
    inside, held = [running(FLEX, 1), running(FLEX, 2)], [(1,), (2,)]
    assert choose(inside, [Waiting(PRIORITY, 9), Waiting(PRIORITY, 1)], held=held) == []


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(TIERS),
        st.integers(1, 300),
        is_prompt=st.booleans(),
        held=st.integers(0, RULES.most_held + 1),
    ),
    max_size=8,
)


@given(
    STEPS,
    st.lists(
        st.builds(Waiting, st.sampled_from(TIERS), st.integers(0, 6), st.integers(1, 300)),
        max_size=6,
    ),
    st.integers(0, 6),
    st.integers(0, 20),
    st.integers(1, 400),
)
def test_prompts_are_held_back_for_better_requests_alone_and_no_more_than_they_need(
    inside, waiting, slots, blocks, budget
):
    waiting = sorted(waiting, key=lambda one: one.priority)
    options = {"free_slots": slots, "free_blocks": blocks, "budget": budget, "rules": RULES}
    held = choose_held(inside, waiting, **options)
    assert len(set(held)) == len(held)
    starting = waiting[:slots]
    for i in held:
        assert inside[i].is_prompt and inside[i].held < RULES.most_held
        assert any(inside[i].priority - one.priority > RULES.margin for one in starting)
    # Without the last of them the newcomers would lack room.
    left = budget - sum(one.tokens for i, one in enumerate(inside) if i not in held[:-1])
    if held:
        assert left < min(sum(one.tokens for one in starting), budget)


PRIORITIES = st.sampled_from(TIERS)
INSIDE = st.lists(
    st.builds(
        Running,
        priority=PRIORITIES,
        arrival=st.floats(0, 100),
        tokens_left=st.integers(0, 20),
        preemptions=st.integers(0, 20),
        tokens_since=st.integers(0, 30),
        suspendable=st.sampled_from([True, True, True, False]),
    ),
    max_size=8,
)
NEWCOMERS = st.lists(st.builds(Waiting, PRIORITIES, st.integers(0, 6)), max_size=8)


@st.composite
def moments(draw):
    inside = draw(INSIDE)
    blocks = st.frozensets(st.integers(0, 12), max_size=5)
    held = [draw(blocks) for _ in inside]
    shared = {b: sum(b in one for one in held) for one in held for b in one}
    return {
        "inside": inside,
        "waiting": sorted(draw(NEWCOMERS), key=lambda one: one.priority),
        "slots": draw(st.integers(-1, 4)),
        "blocks": draw(st.integers(0, 12)),
        "held": held,
        "shared": shared,
    }


def placed(moment, victims):
    """How many of the waiting have room, in their order, once the victims have gone."""
    left = [held for i, held in enumerate(moment["held"]) if i not in victims]
    freed = set().union(*moment["held"]) - set().union(*left) if moment["held"] else set()
    slots, blocks = moment["slots"] + len(victims), moment["blocks"] + len(freed)
    count = 0
    for one in moment["waiting"]:
        slots, blocks = slots - 1, blocks - one.blocks
        if slots < 0 or blocks < 0:
            break
        count += 1
    return count


@given(moments())
def test_nobody_is_suspended_by_its_own_tier_or_against_the_rules(moment):
    victims = choose(**moment)
    assert len(set(victims)) == len(victims)
    newcomers = moment["waiting"][: placed(moment, victims)]
    for i in victims:
        victim = moment["inside"][i]
        assert victim.suspendable and victim.tokens_left > RULES.nearly_done
        assert victim.preemptions < RULES.most_preemptions
        assert victim.preemptions == 0 or victim.tokens_since >= RULES.tokens_between
        assert any(one.priority < victim.priority for one in newcomers)


@given(moments())
def test_no_victim_is_superfluous(moment):
    victims = choose(**moment)
    before = placed(moment, victims)
    for one in victims:
        assert placed(moment, [i for i in victims if i != one]) < before


@given(moments())
def test_nobody_that_may_stay_goes_before_a_worse_one_where_slots_are_short(moment):
    moment |= {"blocks": 1000}
    victims = choose(**moment)
    stay = [i for i in range(len(moment["inside"])) if i not in victims]
    could = [moment["inside"][i] for i in stay if moment["inside"][i].can_be_suspended(RULES)]
    best = min((moment["inside"][i].priority for i in victims), default=FLEX)
    assert all(one.priority <= best for one in could)


@dataclass
class Job:
    priority: int
    arrival: int
    length: int
    done: int = 0
    history: History = field(default_factory=History)
    preempted_at: list[int] = field(default_factory=list)
    ended: int | None = None


class SmallEngine:
    """Slots, one token a step for each running request, and vLLM's order of the waiting."""

    def __init__(self, slots, rules):
        self.slots, self.rules = slots, rules
        self.now, self.inside, self.queue = 0, [], []

    def arrive(self, priority, length):
        job = Job(priority, self.now, length)
        self.queue.append(job)
        return job

    def step(self):
        for job in self.queue:
            overdue = job.history.total_s(self.now) > self.rules.longest_suspended_s
            if overdue and job.history.since is not None:
                job.priority = self.rules.best_priority
        for job in self._victims():
            self.inside.remove(job)
            job.history.suspend(job.done, self.now)
            job.preempted_at.append(job.done)
            self.queue.append(job)
        self.queue.sort(key=self._place)
        while self.queue and len(self.inside) < self.slots:
            job = self.queue.pop(0)
            job.history.resume(self.now)
            self.inside.append(job)
        self.now += 1
        for job in list(self.inside):
            job.done += 1
            if job.done == job.length:
                job.ended = self.now
                self.inside.remove(job)

    @staticmethod
    def _place(job):
        return job.priority, job.arrival

    def _victims(self):
        chosen = choose(
            [
                Running(
                    job.priority,
                    job.arrival,
                    job.length - job.done,
                    job.history.preemptions,
                    job.done - job.history.tokens,
                )
                for job in self.inside
            ],
            [Waiting(job.priority) for job in sorted(self.queue, key=self._place)],
            slots=self.slots - len(self.inside),
            rules=self.rules,
        )
        return [self.inside[i] for i in chosen]


SHORT = replace(RULES, tokens_between=3, most_preemptions=4, nearly_done=1, longest_suspended_s=30)


@given(
    slots=st.integers(1, 3),
    arrivals=st.lists(st.tuples(st.integers(0, 5), PRIORITIES, st.integers(1, 30)), max_size=40),
)
def test_every_request_gets_on_and_is_suspended_within_the_bounds(slots, arrivals):
    engine, jobs = SmallEngine(slots, SHORT), []
    for pause, priority, length in arrivals:
        for _ in range(pause):
            engine.step()
        jobs.append(engine.arrive(priority, length))
    for _ in range(sum(job.length for job in jobs) + len(jobs)):
        engine.step()
    for job in jobs:
        assert job.ended is not None and job.done == job.length
        assert len(job.preempted_at) <= SHORT.most_preemptions
        assert all(b - a >= SHORT.tokens_between for a, b in pairwise(job.preempted_at))
        assert all(job.length - done > SHORT.nearly_done for done in job.preempted_at)


@pytest.mark.parametrize("victim", [DEFAULT, FLEX])
def test_a_flood_of_better_requests_holds_a_suspended_one_for_so_long_and_no_longer(victim):
    slots, length = 3, 10
    engine = SmallEngine(slots, SHORT)
    held = engine.arrive(victim, 40)
    for _ in range(200):
        engine.step()
        while len(engine.queue) < slots:  # priority always waits
            engine.arrive(PRIORITY, length)
    assert held.ended is not None
    # Once it counts as priority, the next slot that comes free is its own.
    assert held.history.suspended_s <= SHORT.longest_suspended_s + length + 1
    assert held.history.preemptions <= SHORT.most_preemptions
