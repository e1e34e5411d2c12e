"""What holds of every plan, whatever the demand."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.config.scaling import ScalingSettings
from app.core.tiers import Tier
from app.scaling.plan import plan
from app.scaling.state import ModelState, PoolState, TierDemand

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
SETTINGS = ScalingSettings()
NOBODY = dict.fromkeys(Tier, TierDemand())

demands = st.builds(
    TierDemand,
    waiting=st.integers(0, 200),
    running=st.integers(0, 200),
    oldest_s=st.floats(0, 100),
    rate=st.floats(0, 20),
    service_s=st.none() | st.floats(0.1, 30),
)


@st.composite
def pools(draw):
    bounds = sorted([draw(st.integers(0, 6)), draw(st.integers(1, 40))])
    return PoolState(
        name=draw(st.uuids()).hex,
        slots=draw(st.sampled_from([1, 4, 8, 64])),
        replicas=draw(st.integers(bounds[0], bounds[1])),
        least=bounds[0],
        most=bounds[1],
        honours=draw(st.booleans()),
        cost=draw(st.floats(0.1, 10)),
        preempts=draw(st.booleans()),
    )


states = st.builds(
    ModelState,
    tiers=st.fixed_dictionaries(dict.fromkeys(Tier, demands)),
    pools=st.lists(pools(), min_size=1, max_size=3).map(tuple),
    headroom=st.sampled_from([0.0, 0.1, 0.3]),
    awake=st.booleans(),
)


def slots(state, replicas, *, honouring=False):
    return sum(
        replicas[pool.name] * pool.slots for pool in state.pools if pool.honours or not honouring
    )


def with_demand(state, **tiers):
    demand = {Tier(name): one for name, one in tiers.items()}
    return replace(state, tiers={**state.tiers, **demand})


def one_pool(**pool):
    settings = {"slots": 8, "replicas": 1, "least": 0, "most": 50} | pool
    return ModelState(dict(NOBODY), (PoolState("pool", **settings),))


def replicas(state, settings=SETTINGS, **tiers):
    return plan(with_demand(state, **tiers), settings).replicas["pool"]


@given(states)
def test_bounds_hold_and_there_is_a_reason(state):
    made = plan(state, SETTINGS)
    assert all(pool.least <= made.replicas[pool.name] <= pool.most for pool in state.pools)
    assert made.why and "\n" not in made.why


@given(states, st.sampled_from([P, D]), st.integers(0, 50), st.floats(0, 10), st.floats(0, 30))
def test_more_demand_never_means_less(state, tier, waiting, rate, oldest_s):
    one = state.tiers[tier]
    assume(one.service_s is not None)
    # Served as default, priority counts with default's time in an engine, which is that of a mix.
    assume(any(pool.honours for pool in state.pools))
    more = replace(
        one, waiting=one.waiting + waiting, rate=one.rate + rate, oldest_s=one.oldest_s + oldest_s
    )
    before = plan(state, SETTINGS).replicas
    after = plan(with_demand(state, **{tier.value: more}), SETTINGS).replicas
    # What each pool gets may change as the mix does; what is there in all does not shrink but by
    # what a last replica has too many.
    biggest = max(pool.slots for pool in state.pools)
    spare = 0 if len(state.pools) == 1 else biggest
    assert slots(state, after) >= slots(state, before) - spare


@given(states)
def test_priority_grows_only_pools_that_honour_it(state):
    others = with_demand(state, default=TierDemand(), flex=TierDemand())
    assume(any(pool.honours for pool in state.pools))
    made = plan(others, SETTINGS).replicas
    honouring = [pool for pool in state.pools if pool.honours]
    if state.tiers[P].present or state.tiers[P].rate:
        for pool in state.pools:
            assert pool.honours or made[pool.name] == pool.least
        room = all(made[pool.name] == pool.most for pool in honouring)
        assert room or slots(state, made, honouring=True) > state.tiers[P].present * 0.99


@given(states, demands)
def test_flex_alone_never_grows_beyond_what_is_configured(state, flex):
    alone = with_demand(state, priority=TierDemand(), default=TierDemand(), flex=flex)
    made = plan(alone, SETTINGS).replicas
    assert sum(made.values()) <= max(1, sum(pool.least for pool in state.pools))
    none = SETTINGS.model_copy(update={"flex_replicas": 0})
    asleep = plan(replace(alone, awake=False), none).replicas
    assert asleep == {pool.name: pool.least for pool in state.pools}


@given(states, demands)
def test_flex_adds_nothing_to_what_default_needs(state, flex):
    calm = with_demand(state, priority=TierDemand(), flex=TierDemand())
    busy = with_demand(calm, flex=flex)
    before, after = (plan(one, SETTINGS).replicas for one in (calm, busy))
    assert sum(after.values()) <= max(sum(before.values()), 1)


@given(states, st.integers(0, 5))
def test_flex_adds_no_more_replicas_to_what_others_need_than_is_configured(state, extra):
    settings = SETTINGS.model_copy(update={"flex_extra_replicas": extra})
    before, after = (plan(state, one).replicas for one in (SETTINGS, settings))
    assert sum(before.values()) <= sum(after.values()) <= sum(before.values()) + extra
    assert all(after[pool.name] <= pool.most for pool in state.pools)


def test_flex_gets_replicas_beside_others_where_that_is_configured():
    default = TierDemand(rate=3.0, service_s=10.0)
    flex = TierDemand(waiting=100, rate=1.5, service_s=10.0)
    alone, some, enough = (
        replicas(
            one_pool(),
            SETTINGS.model_copy(update={"flex_extra_replicas": extra}),
            default=default,
            flex=flex,
        )
        for extra in (0, 1, 50)
    )
    # 30 slots and the headroom for default; 45 and the headroom with flex.
    assert (alone, some, enough) == (5, 6, 7)


@given(demands)
def test_without_a_pool_that_honours_it_priority_counts_as_default(demand):
    state = one_pool(honours=False)
    assert replicas(state, priority=demand) == replicas(state, default=demand)


def test_who_waits_wakes_a_model():
    for tier in ("priority", "default", "flex"):
        waits = with_demand(one_pool(), **{tier: TierDemand(waiting=1)})
        assert plan(replace(waits, awake=False), SETTINGS).replicas["pool"] == 1
    assert plan(replace(one_pool(), awake=False), SETTINGS).replicas["pool"] == 0


def test_priority_gets_the_slots_that_the_formula_asks_for():
    state = one_pool()
    calm = TierDemand(rate=0.1, service_s=10.0)
    assert replicas(state, priority=calm) == 1
    # Two of eight slots busy by default: the eighth, kept for priority, is free nearly always.
    assert replicas(state, priority=calm, default=TierDemand(rate=0.2, service_s=10.0)) == 1
    # Seven busy: two replicas, with two slots kept, of which one is nearly always free.
    assert replicas(state, priority=calm, default=TierDemand(rate=0.65, service_s=10.0)) == 2


def test_where_flex_takes_all_that_is_idle_priority_needs_more_headroom():
    priority = TierDemand(rate=0.2, service_s=10.0)
    flex = TierDemand(rate=10.0, service_s=10.0)
    alone, beside = (
        replicas(one_pool(), priority=priority),
        replicas(one_pool(), priority=priority, flex=flex),
    )
    # Two of 16 kept are both taken too often; three of 24 hardly ever.
    assert (alone, beside) == (1, 3)


def test_where_engines_preempt_a_backlog_of_flex_is_not_in_the_way_of_priority():
    # Azure's conversation trace at 20 replicas had this after ten minutes.
    state = replace(one_pool(slots=64, most=80, replicas=19, preempts=True), headroom=0.0)
    tiers = {
        "priority": TierDemand(running=150, rate=44.0, service_s=3.0),
        "default": TierDemand(running=913, rate=244.0, service_s=3.0),
    }
    backlog = TierDemand(waiting=18_000, running=100, oldest_s=10.0, rate=85.0, service_s=3.0)
    assert replicas(state, **tiers, flex=backlog) == replicas(state, **tiers) < 19
    kept = replace(state, pools=(replace(state.pools[0], preempts=False),))
    assert replicas(kept, **tiers, flex=backlog) == 80, "all that may be had"


@given(states)
def test_preemption_never_needs_more(state):
    # With pools of several sizes, fewer slots for priority may leave more for default to round up.
    one = state.pools[:1]
    calm = replace(state, pools=tuple(replace(pool, preempts=False) for pool in one))
    able = replace(state, pools=tuple(replace(pool, preempts=True) for pool in one))
    needed = slots(calm, plan(calm, SETTINGS).replicas)
    assert slots(able, plan(able, SETTINGS).replicas) <= needed


def test_flex_that_does_not_wait_counts_by_what_comes_and_not_by_what_is_there():
    priority = TierDemand(rate=0.01, service_s=10.0)
    flex = TierDemand(running=7, rate=0.1, service_s=10.0)
    assert replicas(one_pool(), priority=priority, flex=flex) == 1
    waits = replace(flex, waiting=1, oldest_s=5.0)
    assert replicas(one_pool(), priority=priority, flex=waits) == 1
    # Who has waited for as long as one keeps a slot will fill whatever there is.
    assert replicas(one_pool(), priority=priority, flex=replace(waits, oldest_s=10.0)) == 2


def test_priority_counts_at_once_and_with_headroom():
    demand = TierDemand(waiting=12, running=8, rate=0.0, service_s=10.0)
    # Twenty slots are used and a tenth is kept free besides.
    assert replicas(one_pool(), priority=demand) == 3
    assert replicas(one_pool(), priority=replace(demand, waiting=16)) == 4


def test_default_waits_its_time_before_it_counts():
    demand = TierDemand(waiting=60, running=7, rate=0.5, service_s=10.0)
    assert replicas(one_pool(), default=demand) == 1
    assert replicas(one_pool(), default=replace(demand, oldest_s=30.0)) == 4


def test_cheapest_first():
    cheap = PoolState("cheap", 8, 0, 0, 2, honours=False, cost=1.0)
    dear = PoolState("dear", 8, 0, 0, 50, honours=True, cost=3.0)
    state = ModelState(dict(NOBODY), (dear, cheap))
    default = with_demand(state, default=TierDemand(rate=3.0, service_s=10.0))
    assert plan(default, SETTINGS).replicas == {"cheap": 2, "dear": 3}
    priority = with_demand(state, priority=TierDemand(rate=0.3, service_s=10.0))
    assert plan(priority, SETTINGS).replicas == {"cheap": 0, "dear": 2}
