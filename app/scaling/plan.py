"""From a model's demand to its replicas. A function of one state; see ``app.scaling.state``.

- **Priority** gets as many slots, on pools that honour it, that no more than a set part of its
  requests finds none free (``app.scaling.queueing``), and never less than it uses now and the
  headroom besides, nor less than it has needed lately, where engines start slowly.
- **Default** gets as many, on whatever pool, that it waits no longer than a set time on the
  average; what waits counts the more, the longer it has waited.
- **Flex** fills what is idle. Alone it keeps a set number of replicas at the most, and adds
  another to what the others need.
- Where no pool honours priority it is served as default, and counts as such.
- The cheapest pools come first, by the cost of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from app.config.queue import headroom_of
from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.queueing import Crowd, crowd
from app.scaling.state import ModelState, Plan, PoolState, ScalingReason, TierDemand

# How long flex may wait on the average, where replicas may be added for it: half of its longest
# wait in the queue, so that few have to be turned away.
_FLEX_WAIT_S = 300.0


def plan(state: ModelState, settings: ScalingSettings) -> Plan:
    """Return how many replicas each pool ought to have, by what is known now alone."""
    honouring = [pool for pool in state.pools if pool.honours]
    priority = state.tiers[Tier.PRIORITY] if honouring else TierDemand()
    default, flex = state.tiers[Tier.DEFAULT], state.tiers[Tier.FLEX]
    if not honouring:
        default = _together(default, state.tiers[Tier.PRIORITY])
    for_priority = _for_priority(state, priority, default, flex, settings)
    for_default = _for_default(state, priority, default, settings)
    for_flex = _for_flex(state, flex, settings)
    fleet = _Fleet(state.pools)
    lately = state.remembered if state.awake else 0
    fleet.grow(honouring, max(for_priority, lately), ScalingReason.PRIORITY)
    fleet.grow(state.pools, for_default, ScalingReason.DEFAULT)
    beside = _beside_others(state, priority, default, flex) if settings.flex_extra_replicas else 0
    fleet.grow(state.pools, beside, ScalingReason.FLEX, at_most=settings.flex_extra_replicas)
    fleet.keep(for_flex, ScalingReason.FLEX)
    fleet.keep(int(state.awake), ScalingReason.AWAKE)
    reasons = {
        f"priority needs {for_priority} slots ({_describe(priority)})": for_priority,
        f"priority needed {lately} lately": int(lately > for_priority),
        f"default needs {for_default} slots ({_describe(default)})": for_default,
        f"flex may keep {for_flex} replicas ({_describe(flex)})": for_flex,
        f"with flex all need {beside} slots": beside,
    }
    why = [words for words, needed in reasons.items() if needed]
    nobody = "nobody waits" if state.awake else "nobody asks"
    return Plan(fleet.replicas, fleet.reasons, "; ".join(why) or nobody, for_priority)


def _for_priority(
    state: ModelState,
    priority: TierDemand,
    default: TierDemand,
    flex: TierDemand,
    settings: ScalingSettings,
) -> int:
    """Return how many slots of pools that honour it priority needs."""
    if not priority.present and not priority.rate:
        return 0
    others = default.load + _flex_load(flex)
    # Other requests use the other pools as well, by what these have.
    elsewhere = sum(pool.replicas * pool.slots for pool in state.pools if not pool.honours)

    def enough(slots: int) -> bool:
        free = slots - headroom_of(state.headroom, slots)
        if priority.present > free:
            return False
        here = others * slots / (slots + elsewhere)
        return _crowd(state, slots, priority.load, here).priority_waits <= (
            settings.priority_wait_probability
        )

    return _least(enough, _most(pool for pool in state.pools if pool.honours))


def _flex_load(flex: TierDemand) -> float:
    """Return how many slots flex fills of those that it may use.

    Flex that has waited for as long as one keeps a slot fills all of them, however little of it
    comes. One that waits for a moment is what its load has in it.
    """
    backlog = flex.waiting and flex.oldest_s >= (flex.service_s or 0.0)
    return max(flex.load, flex.present) if backlog else flex.load


def _for_default(
    state: ModelState, priority: TierDemand, default: TierDemand, settings: ScalingSettings
) -> int:
    """Return how many slots default needs beside priority."""
    if not default.present and not default.rate:
        return 0
    service_s = default.service_s or settings.default_wait_s
    aged = min(1.0, default.oldest_s / settings.default_wait_s)
    # A new engine helps only once it has started; what waits now has until then, too.
    backlog = aged * default.waiting * service_s / (settings.default_wait_s + state.start_s)

    def enough(slots: int) -> bool:
        met = _crowd(state, slots, priority.load, default.load)
        if met.spare <= 0 or met.spare < backlog:
            return False
        return met.others_wait * service_s / met.spare <= settings.default_wait_s

    return _least(enough, _most(state.pools))


def _for_flex(state: ModelState, flex: TierDemand, settings: ScalingSettings) -> int:
    """Return how many replicas flex may keep running by itself."""
    if not flex.present and not (flex.rate and state.awake):
        return 0
    cheapest = _cheapest_first(state.pools)[0]
    return min(max(1, math.ceil(flex.load / cheapest.slots)), settings.flex_replicas)


def _beside_others(
    state: ModelState, priority: TierDemand, default: TierDemand, flex: TierDemand
) -> int:
    """Return how many slots all need so that flex, which is served last, is served in time."""
    if not flex.load:
        return 0
    load = default.load + flex.load
    work_s = default.load * (default.service_s or 0.0) + flex.load * (flex.service_s or 0.0)
    # On the average of both; nearly all of the waiting is flex's.
    service_s, wait_s = work_s / load, _FLEX_WAIT_S * flex.load / load

    def enough(slots: int) -> bool:
        met = _crowd(state, slots, priority.load, load)
        return met.spare > 0 and met.others_wait * service_s / met.spare <= wait_s

    return _least(enough, _most(state.pools))


def _crowd(state: ModelState, slots: int, priority: float, others: float) -> Crowd:
    return crowd(slots, headroom_of(state.headroom, slots), priority, others)


def _together(one: TierDemand, other: TierDemand) -> TierDemand:
    """Return two tiers' demand as one's."""
    rate, load = one.rate + other.rate, one.load + other.load
    known = one.service_s is not None and other.service_s is not None
    return TierDemand(
        waiting=one.waiting + other.waiting,
        running=one.running + other.running,
        oldest_s=max(one.oldest_s, other.oldest_s),
        rate=rate,
        service_s=load / rate if known and rate else one.service_s or other.service_s,
    )


def _least(enough: Callable[[int], bool], most: int) -> int:
    """Return the least number of slots that is enough, or all that there may be."""
    few, many = 0, 1
    while many < most and not enough(many):
        few, many = many, 2 * many
    many = min(many, most)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def _most(pools: Iterable[PoolState]) -> int:
    return sum(pool.most * pool.slots for pool in pools)


def _cheapest_first(pools: Iterable[PoolState]) -> list[PoolState]:
    return sorted(pools, key=lambda pool: (pool.slot_cost, pool.name))


class _Fleet:
    """Replicas by pool, while they are planned, and why each pool has as many."""

    def __init__(self, pools: Iterable[PoolState]) -> None:
        self._pools = _cheapest_first(pools)
        self.replicas = {pool.name: pool.least for pool in self._pools}
        self.reasons = dict.fromkeys(self.replicas, ScalingReason.LEAST)

    def grow(
        self,
        pools: Iterable[PoolState],
        slots: int,
        reason: ScalingReason,
        at_most: float = math.inf,
    ) -> None:
        """Add replicas, the cheapest first, until these pools have so many slots."""
        pools = _cheapest_first(pools)
        missing = slots - sum(self.replicas[pool.name] * pool.slots for pool in pools)
        for pool in pools:
            if missing > 0:
                wanted = int(min(math.ceil(missing / pool.slots), at_most))
                added = self._add(pool, wanted, reason)
                missing -= added * pool.slots
                at_most -= added

    def keep(self, replicas: int, reason: ScalingReason) -> None:
        """Add replicas, the cheapest first, until there are so many in all."""
        missing = replicas - sum(self.replicas.values())
        for pool in self._pools:
            if missing > 0:
                missing -= self._add(pool, missing, reason)

    def _add(self, pool: PoolState, wanted: int, reason: ScalingReason) -> int:
        added = min(wanted, pool.most - self.replicas[pool.name])
        if added:
            self.replicas[pool.name] += added
            self.reasons[pool.name] = reason
        return added


def _describe(demand: TierDemand) -> str:
    words = f"{demand.load:.1f} busy, {demand.running} running, {demand.waiting} waiting"
    return f"{words} up to {demand.oldest_s:.0f} s" if demand.waiting else words
