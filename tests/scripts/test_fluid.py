"""The fluid model of a fleet, against the one that follows requests."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from scripts.bench.batching import Cluster, Simulation
from scripts.bench.engine_model import PUBLISHED, fit
from scripts.bench.fluid import FluidSimulation, Mean, batch_at
from scripts.bench.policies import Fixed
from scripts.bench.traffic import Traffic, work_of

pytestmark = pytest.mark.unit

ENGINE = fit(PUBLISHED)


def traffic(load, seconds=600.0, replicas=2):
    """Poisson arrivals that keep a share of the replicas busy, the tiers in the usual parts."""
    random = np.random.default_rng(1)
    one = np.array([[0.0, 1, 500.0, 100.0, 500.0, 1.0]])
    number = int(load * replicas * seconds / work_of(ENGINE, one)[0])
    columns = np.repeat(one, number, axis=0)
    columns[:, 0] = np.sort(random.uniform(0, seconds, number))
    columns[:, 1] = random.choice(3, number, p=(0.1, 0.6, 0.3))
    return Traffic("made up", replicas, seconds, columns, work_of(ENGINE, columns))


def both(load, replicas=2):
    arrivals = traffic(load, replicas=replicas)
    cluster = Cluster(ENGINE, 30.0, replicas, replicas, 5.0)
    fluid = FluidSimulation(cluster, Fixed(replicas), QueueSettings()).run(arrivals, 5.0)
    single = Simulation(cluster, Fixed(replicas), QueueSettings())
    return fluid, single.run(arrivals.arrivals(), arrivals.seconds), arrivals


def shed(served, rank):
    return sum(weight for _, took, weight in served.ended[rank] if np.isinf(took))


def test_with_room_nothing_waits_and_all_are_served():
    fluid, single, arrivals = both(0.7)
    for served in (fluid, single):
        assert max(wait for _, wait, _ in served.waits[0]) < 1
        assert [shed(served, rank) for rank in range(3)] == [0, 0, 0]
    served = sum(weight for tier in fluid.ended for _, _, weight in tier)
    assert served == pytest.approx(len(arrivals.columns), rel=0.001)


def test_under_too_much_load_both_keep_priority_and_shed_as_much_flex():
    fluid, single, _ = both(1.3)
    assert shed(fluid, 0) == shed(single, 0) == 0
    assert max(wait for _, wait, _ in fluid.waits[0]) == 0
    assert fluid.tokens == pytest.approx(single.tokens, rel=0.1)


def test_nothing_arrives_for_a_while():
    arrivals = traffic(0.7)
    gap = (arrivals.columns[:, 0] < 60) | (arrivals.columns[:, 0] > 300)
    rest = replace(arrivals, columns=arrivals.columns[gap], work=arrivals.work[gap])
    cluster = Cluster(ENGINE, 30.0, 2, 2, 5.0)
    served = FluidSimulation(cluster, Fixed(2), QueueSettings()).run(rest, 5.0)
    assert served.tokens == pytest.approx(600 * gap.sum())


class Watch(Fixed):
    """Keeps the last report."""

    def decide(self, view):
        self.tiers = view.report.tiers
        return super().decide(view)


def test_each_tier_has_its_own_service_time_as_by_request():
    arrivals = traffic(0.7)
    long = arrivals.columns[:, 1] == 0
    arrivals.columns[long, 3] = 400.0
    arrivals = replace(arrivals, work=work_of(ENGINE, arrivals.columns))
    cluster = Cluster(ENGINE, 30.0, 2, 2, 5.0)
    by_fluid, by_request = Watch(2), Watch(2)
    FluidSimulation(cluster, by_fluid, QueueSettings()).run(arrivals, 5.0)
    single = Simulation(cluster, by_request, QueueSettings())
    single.run(arrivals.arrivals(), arrivals.seconds)
    for tier in (Tier.PRIORITY, Tier.DEFAULT):
        fluid, requests = (policy.tiers[tier] for policy in (by_fluid, by_request))
        took = requests.served_s / requests.finished
        assert fluid.served_s / fluid.finished == pytest.approx(took, rel=0.15)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_busier_engine_has_a_larger_batch_and_is_slower(one, other):
    mean = Mean(500.0, 100.0, 500.0)
    (small, fast), (large, slow) = (batch_at(ENGINE, mean, u) for u in sorted((one, other)))
    assert 0 <= small <= large <= ENGINE.slots
    assert fast <= slow


def test_a_full_engine_has_all_its_slots_busy():
    batch, _ = batch_at(replace(ENGINE, slots=48), Mean(500.0, 100.0, 500.0), 1.0)
    assert batch == pytest.approx(48)
