"""Computes replicas from a model's demand: a function of one state; see ``app.scaling.state``.

- **Priority** gets slots on pools that honour it, so that at most a set share of its requests
  finds none free (``app.scaling.queueing``). It gets at least what it uses now plus the headroom,
  and, where engines start slowly, at least what it has needed recently. Where all these pools
  preempt, the slots of default and flex are its reserve: only priority itself can be in its way.
- **Default** gets slots on any pool, so that its average wait is at most a set time. Waiting
  requests count more, the longer they have waited.
- **Flex** fills idle slots. Alone it keeps at most a set number of replicas, and it may add another
  set number to what the others need.
- If no pool honours priority, priority requests are served as default, and count as such.
- Pools with the cheapest slots grow first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from app.config.queue import headroom_of
from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.queueing import Crowd, crowd
from app.scaling.state import ModelState, Plan, PoolState, ScalingReason, TierDemand

# How long flex may wait on average if replicas may be added for it, in seconds: half of its longest
# wait in the queue, so that few requests are shed.
_FLEX_WAIT_S = 300.0


def plan(state: ModelState, settings: ScalingSettings) -> Plan:
    """Return how many replicas each pool needs, from the current state alone."""
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
        f"priority recently needed {lately} slots": int(lately > for_priority),
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
    """Return how many slots priority needs on pools that honour it."""
    if not priority.present and not priority.rate:
        return 0
    # Whatever others run, priority takes it where engines preempt.
    others = 0.0 if state.preempts else default.load + _flex_load(flex)
    # Other requests are spread over all pools in proportion to their slots.
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

    If the oldest flex request has waited for a service time, there is a backlog: every flex request
    present fills a slot, however few arrive. A shorter wait is part of the normal load.
    """
    backlog = flex.waiting and flex.oldest_s >= (flex.service_s or 0.0)
    return max(flex.load, flex.present) if backlog else flex.load


def _for_default(
    state: ModelState, priority: TierDemand, default: TierDemand, settings: ScalingSettings
) -> int:
    """Return how many slots default needs in addition to priority's load."""
    if not default.present and not default.rate:
        return 0
    service_s = default.service_s or settings.default_wait_s
    aged = min(1.0, default.oldest_s / settings.default_wait_s)
    # A new engine helps only once it has started, so the backlog has that time as well.
    backlog = aged * default.waiting * service_s / (settings.default_wait_s + state.start_s)

    def enough(slots: int) -> bool:
        met = _crowd(state, slots, priority.load, default.load)
        if met.spare <= 0 or met.spare < backlog:
            return False
        return met.others_wait * service_s / met.spare <= settings.default_wait_s

    return _least(enough, _most(state.pools))


def _for_flex(state: ModelState, flex: TierDemand, settings: ScalingSettings) -> int:
    """Return how many replicas flex alone may keep running."""
    if not flex.present and not (flex.rate and state.awake):
        return 0
    cheapest = _cheapest_first(state.pools)[0]
    return min(max(1, math.ceil(flex.load / cheapest.slots)), settings.flex_replicas)


def _beside_others(
    state: ModelState, priority: TierDemand, default: TierDemand, flex: TierDemand
) -> int:
    """Return how many slots all tiers need so that flex, served last, is served in time."""
    if not flex.load:
        return 0
    load = default.load + flex.load
    work_s = default.load * (default.service_s or 0.0) + flex.load * (flex.service_s or 0.0)
    # Averages over both tiers; nearly all of the waiting is flex's.
    service_s, wait_s = work_s / load, _FLEX_WAIT_S * flex.load / load

    def enough(slots: int) -> bool:
        met = _crowd(state, slots, priority.load, load)
        return met.spare > 0 and met.others_wait * service_s / met.spare <= wait_s

    return _least(enough, _most(state.pools))


def _crowd(state: ModelState, slots: int, priority: float, others: float) -> Crowd:
    return crowd(slots, headroom_of(state.headroom, slots), priority, others)


def _together(one: TierDemand, other: TierDemand) -> TierDemand:
    """Return the demand of two tiers as one."""
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
    """Return the smallest number of slots that is enough, at most ``most``."""
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
    """Replicas by pool during planning, and the reason for each number."""

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
        """Add replicas, the cheapest slots first, until these pools have ``slots``."""
        pools = _cheapest_first(pools)
        missing = slots - sum(self.replicas[pool.name] * pool.slots for pool in pools)
        for pool in pools:
            if missing > 0:
                wanted = int(min(math.ceil(missing / pool.slots), at_most))
                added = self._add(pool, wanted, reason)
                missing -= added * pool.slots
                at_most -= added

    def keep(self, replicas: int, reason: ScalingReason) -> None:
        """Add replicas, the cheapest slots first, until there are ``replicas`` in all."""
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
