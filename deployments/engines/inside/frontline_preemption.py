"""Which running requests an engine suspends, or holds back, so that better ones can run.

Pure: values in, a decision out, the clock passed in. Runs under the engine's interpreter, where
Frontline is not installed: standard library only. A lower priority number is served first, as in
vLLM. Times are in seconds, lengths in tokens, cache sizes in KV blocks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

BlocksOf = Callable[[int], Iterable[tuple[int, int]]]
"""Returns the KV blocks of the running request at this index, each with its reference count. A
block is free again once all its references are gone."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits on preemption.

    Attributes:
        margin: a running request is suspended only for one whose priority number is lower by more
            than this. Tiers are 100 apart, and requests of one tier have one number: 50 separates
            the two.
        tokens_between: a resumed request generates at least this many tokens before it can be
            suspended again. Resuming costs about one step, so 16 keep the loss below a tenth.
        most_preemptions: a request that was suspended this often runs to its end. With 16, the
            recomputation of a long answer stays bounded.
        nearly_done: a request with at most this many tokens left runs to its end. To suspend and
            resume it would cost more than the wait of 4 steps.
        longest_suspended_s: a request that was suspended this long in total counts as one of the
            best tier from then on. It resumes before newer requests and is not suspended again.
            Two minutes are a fifth of the longest time that a flex request waits in a queue.
        best_priority: the number of the best tier.
        most_held: a prompt that is being computed is held back in at most this many steps in a
            row. With 16, it gets at least every 17th step, however many better requests come.
    """

    margin: int = 50
    tokens_between: int = 16
    most_preemptions: int = 16
    nearly_done: int = 4
    longest_suspended_s: float = 120.0
    best_priority: int = -100
    most_held: int = 16


@dataclass(slots=True)
class History:
    """How often and how long one request was suspended.

    Attributes:
        preemptions: how often.
        tokens: how many tokens it had generated at the last preemption.
        suspended_s: the total time of the suspensions that are over.
        since: when the current suspension began; ``None`` while it is not suspended.
        held: in how many steps in a row its prompt was held back, up to now.
    """

    preemptions: int = 0
    tokens: int = 0
    suspended_s: float = 0.0
    since: float | None = None
    held: int = 0

    def suspend(self, tokens: int, now: float) -> None:
        """Record a preemption of a request that has generated ``tokens`` so far."""
        self.preemptions += 1
        self.tokens, self.since = tokens, now

    def resume(self, now: float) -> float:
        """Record that the request runs again, or has ended; return how long it was suspended."""
        took_s = self.total_s(now) - self.suspended_s
        self.suspended_s, self.since = self.suspended_s + took_s, None
        return took_s

    def total_s(self, now: float) -> float:
        """Return the total time of all suspensions, the current one included."""
        return self.suspended_s + (now - self.since if self.since is not None else 0.0)


@dataclass(frozen=True, slots=True)
class Running:
    """A running request.

    Attributes:
        priority: its number.
        arrival: when it arrived, by any clock.
        tokens_left: how many tokens it may still generate.
        preemptions: how often it was suspended.
        tokens_since: how many tokens it has generated since it was last suspended.
        suspendable: whether the engine can suspend it now.
    """

    priority: int
    arrival: float
    tokens_left: int
    preemptions: int = 0
    tokens_since: int = 0
    suspendable: bool = True

    def can_be_suspended(self, rules: Rules) -> bool:
        """Whether the rules allow to suspend it for a request of a better tier."""
        recent = self.preemptions > 0 and self.tokens_since < rules.tokens_between
        return (
            self.suspendable
            and not recent
            and self.preemptions < rules.most_preemptions
            and self.tokens_left > rules.nearly_done
        )


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting request that could run now.

    Attributes:
        priority: its number.
        blocks: the KV blocks that it needs.
        tokens: how many tokens of it have to be computed before it can generate one.
    """

    priority: int
    blocks: int = 0
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """What a running request would have computed in the next step.

    Attributes:
        priority: its number.
        tokens: how many tokens of it.
        is_prompt: whether these belong to a prompt that is computed in several steps.
        held: in how many steps in a row it was held back, up to now.
    """

    priority: int
    tokens: int
    is_prompt: bool = False
    held: int = 0


def choose_victims(
    running: Sequence[Running],
    waiting: Iterable[Waiting],
    *,
    free_slots: int,
    free_blocks: int,
    blocks_of: BlocksOf,
    rules: Rules,
) -> list[int]:
    """Return the indices of the running requests to suspend.

    Args:
        running: the running requests, in any order.
        waiting: the waiting requests in the engine's own order. The engine serves them strictly in
            this order, so the first that no room can be made for ends the search.
        free_slots: how many requests more could run; negative if more run than allowed.
        free_blocks: how many KV blocks are free.
        blocks_of: the KV blocks of each running request.
        rules: the limits.

    The worst running requests are suspended first, of equal ones those that arrived last: the
    engine resumes them in the reverse order. No victim is superfluous.
    """
    order = sorted(
        (i for i, one in enumerate(running) if one.can_be_suspended(rules)),
        key=lambda i: (running[i].priority, running[i].arrival),
        reverse=True,
    )
    victims: list[int] = []
    placed = blocks_taken = 0
    for newcomer in waiting:
        slots = placed + 1 - free_slots
        blocks = blocks_taken + newcomer.blocks - free_blocks
        worse = [
            i
            for i in order
            if i not in victims and running[i].priority - newcomer.priority > rules.margin
        ]
        chosen = _enough(victims, worse, slots, blocks, blocks_of)
        if chosen is None:
            break
        victims = chosen
        placed, blocks_taken = placed + 1, blocks_taken + newcomer.blocks
    return victims


def choose_held(
    running: Sequence[Step],
    waiting: Iterable[Waiting],
    *,
    free_slots: int,
    free_blocks: int,
    budget: int,
    rules: Rules,
) -> list[int]:
    """Return the indices of the running prompts to hold back in this step.

    An engine computes at most ``budget`` tokens in a step, those of running requests first. So the
    long prompt of a lower tier would take whole steps for itself, and a better request would wait
    for its last one although a slot is free. Prompts of the worst tier are held back first, and
    only as many as the better requests need. They keep their slots and KV blocks.

    Args:
        running: the running requests, in any order.
        waiting: the waiting requests in the engine's own order.
        free_slots: how many requests more can run now.
        free_blocks: how many KV blocks are free.
        budget: how many tokens a step computes, at most.
        rules: the limits.
    """
    prompts = sorted(
        (i for i, one in enumerate(running) if one.is_prompt),
        key=lambda i: (running[i].priority, i),
        reverse=True,
    )
    held: list[int] = []
    room = budget - sum(one.tokens for one in running)
    needed = blocks = 0
    for newcomer in itertools.islice(waiting, max(0, free_slots)):
        blocks += newcomer.blocks
        needed += newcomer.tokens
        if blocks > free_blocks:
            break
        for i in prompts:
            if room >= min(needed, budget):
                break
            worse = running[i].priority - newcomer.priority > rules.margin
            if worse and i not in held and running[i].held < rules.most_held:
                held.append(i)
                room += running[i].tokens
    return held


def _enough(
    victims: list[int], worse: Sequence[int], slots: int, blocks: int, blocks_of: BlocksOf
) -> list[int] | None:
    """Return as few of ``victims`` and ``worse`` as free enough; ``None`` if all are too few.

    A victim for an earlier newcomer is left out where those for a later one free enough for both.
    They are worse than the later one, and so than the earlier one.
    """
    chosen = list(victims)
    more = iter(worse)
    while not _suffice(chosen, slots, blocks, blocks_of):
        if (victim := next(more, None)) is None:
            return None
        chosen.append(victim)
    for victim in reversed(chosen):
        without = [i for i in chosen if i != victim]
        if _suffice(without, slots, blocks, blocks_of):
            chosen = without
    return chosen


def _suffice(victims: Sequence[int], slots: int, blocks: int, blocks_of: BlocksOf) -> bool:
    if len(victims) < slots:
        return False
    return blocks <= 0 or _freed(victims, blocks_of) >= blocks


def _freed(victims: Sequence[int], blocks_of: BlocksOf) -> int:
    """Return how many blocks are free once these requests are suspended: those no other holds."""
    released: Counter[int] = Counter()
    references: dict[int, int] = {}
    for victim in victims:
        for block, count in blocks_of(victim):
            released[block] += 1
            references[block] = count
    return sum(1 for block, count in released.items() if count >= references[block])
