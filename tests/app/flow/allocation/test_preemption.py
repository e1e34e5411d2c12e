import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.queue import QueueSettings
from app.contracts.credits import Demand
from app.contracts.stats import Suspended
from app.core.tiers import Tier
from app.flow.allocation.preemption import PreemptingReplicas

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
NAMES = ("one", "two", "three")


def replicas(**slots):
    made = PreemptingReplicas(QueueSettings(starvation_every=4))
    made.set_replicas(slots)
    return made


def report(to, ingress, taken, *, waiting=0, oldest_s=0.0, now=0.0):
    running = {tier: sum(row[tier.rank] for row in taken.values()) for tier in Tier}
    demand = Demand(
        ingress, 1, now, "", 0, {}, running, {P: waiting, D: 0, F: 0},
        {P: oldest_s, D: 0.0, F: 0.0}, 0, taken=taken,
    )  # fmt: skip
    to.report(demand, now)


def limit(of, ingress, replica_id, slots, now=0.0, gathered=None):
    return of.limits(ingress, now, gathered or {}).get(replica_id, slots)


def test_priority_may_take_what_priority_of_others_leaves_whoever_has_the_credits():
    on = replicas(a=8, b=8)
    report(on, "one", {"a": (3, 5, 0)})
    report(on, "two", {"a": (0, 8, 4)})
    assert limit(on, "one", "a", 8) == 8
    assert on.limits("two", 0.0, {}) == {"a": 5}


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=3),
)
def test_ingresses_that_renew_in_turn_never_take_more_for_priority_than_there_is(slots, wants):
    on = replicas(a=slots)
    taken = dict.fromkeys(NAMES[: len(wants)], 0)
    for name, (running, waiting) in zip(taken, wants, strict=True):
        report(on, name, {"a": (taken[name], 0, 0)}, waiting=running + waiting)
        taken[name] = min(running, limit(on, name, "a", slots))
        report(on, name, {"a": (taken[name], 0, 0)}, waiting=waiting)
        assert sum(taken.values()) <= slots


@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_who_has_the_slots_does_not_keep_them_when_others_want_some(slots, wants):
    on, names = replicas(a=slots), NAMES[: len(wants)]
    since, had = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for now in range(200):
        for name, want in zip(names, wants, strict=True):
            # Every request ends before the next renewal.
            at = {"oldest_s": now - since[name], "now": float(now)}
            report(on, name, {}, waiting=want, **at)
            taken = min(want, limit(on, name, "a", slots, float(now)))
            report(on, name, {"a": (taken, 0, 0)}, waiting=want - taken, **at)
            since[name] = now if taken else since[name]
            had[name] += taken
    assert all(had.values()), had


@pytest.mark.parametrize(("tier", "age_s"), [(D, 30.0), (F, 150.0)])
def test_once_some_have_been_suspended_for_their_age_priority_leaves_a_part_to_them(tier, age_s):
    on = replicas(a=8)
    taken = (8, 2, 0) if tier is D else (6, 2, 1)
    report(on, "one", {"a": taken}, now=0.0)
    assert on.suspended(10.0)[tier] == Suspended(2 if tier is D else 1, 10.0)
    assert limit(on, "one", "a", 8, age_s - 0.1) == 8
    # One slot in four.
    assert limit(on, "one", "a", 8, age_s) == 6
    resumed = (6, 2, 0) if tier is D else (5, 2, 1)
    report(on, "one", {"a": resumed}, now=age_s + 1)
    assert on.suspended(age_s + 1) == {D: Suspended(), F: Suspended()}
    assert limit(on, "one", "a", 8, age_s + 1) == 6, "or it would be suspended again at once"
    report(on, "one", {"a": (6, 0, 0)}, now=age_s + 2)
    assert limit(on, "one", "a", 8, age_s + 2) == 8


def test_an_ingress_that_is_gone_counts_no_more():
    on = replicas(a=4)
    report(on, "one", {"a": (4, 0, 2)})
    assert limit(on, "two", "a", 4) == 0
    on.forget("one", 1.0)
    on.forget("one", 1.0)
    assert limit(on, "two", "a", 4) == 4
    assert on.suspended(1.0)[F] == Suspended()


def test_a_replica_that_comes_back_counts_what_still_runs_there():
    on = replicas(a=4)
    report(on, "one", {"a": (3, 0, 0)})
    on.set_replicas({})
    assert on.limits("two", 0.0, {}) == {}
    on.set_replicas({"a": 4})
    assert limit(on, "two", "a", 4) == 1


def test_where_slots_are_gathered_others_leave_as_many():
    on = replicas(a=8)
    gathered = {"a": ("one", 6)}
    assert limit(on, "one", "a", 8, gathered=gathered) == 8
    assert limit(on, "two", "a", 8, gathered=gathered) == 2
