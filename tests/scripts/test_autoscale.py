"""The simulation that compares autoscaling policies."""

from dataclasses import replace

import pytest

from app.config.queue import QueueSettings
from app.config.scaling import ScalingSettings
from scripts.bench.autoscale import OURS, Row, hindsight, verdict
from scripts.bench.fleet import Fleet, Simulation
from scripts.bench.policies import Fixed, Foresight, PriorityAware, ServesOwn
from scripts.bench.traces import MIX, SLOTS, Trace

pytestmark = pytest.mark.unit

CALM = Fleet(slots=2, start_s=5.0, initial=1, most=4, control_s=1.0)


def run(policy, requests, seconds=100.0, fleet=CALM, **queue):
    return Simulation(fleet, policy, QueueSettings(**queue)).run(iter(requests), seconds)


def test_a_full_replica_lets_others_wait_and_keeps_a_slot_for_priority():
    requests = [(1.0, 1, 50.0), (2.0, 1, 10.0), (3.0, 0, 10.0)]
    outcome = run(Fixed(1), requests)
    assert outcome.waits == [[0.0], [0.0, 49.0], []]
    assert outcome.replica_s == pytest.approx(100.0)


def test_priority_goes_first_and_nobody_waits_for_ever():
    queue = {"headroom": 0.0}
    requests = [(1.0, 2, 300.0), (1.0, 1, 200.0), (2.0, 1, 1.0), (3.0, 0, 1.0)]
    outcome = run(Fixed(1), requests, 400.0, **queue)
    assert outcome.waits == [[], [0.0], [0.0]]
    assert outcome.shed == [1, 1, 0], "after two minutes"


def test_a_replica_serves_once_it_has_started_and_is_paid_for_until_it_is_empty():
    class Twice:
        def decide(self, view):
            return 2 if view.now < 20 else 1

    requests = [(1.0, 0, 60.0), (2.0, 0, 60.0), (3.0, 0, 60.0)]
    outcome = run(Twice(), requests)
    # The decision falls at the first second, the engine is there five seconds later.
    assert outcome.waits[0] == [0.0, 0.0, 3.0]
    # The one that has least to finish is stopped at 20 s, and ends with its request at 66 s.
    assert outcome.replica_s == pytest.approx(100.0 + 65.0)


def test_serves_own_policy_keeps_its_delays():
    policy = ServesOwn(1.0, most=4)
    requests = [(0.5, 1, 500.0)] * 3
    outcome = run(policy, requests, 800.0)
    targets = [(now, replicas) for now, replicas, _ in outcome.history]
    grew = min(now for now, replicas in targets if replicas > 1)
    assert 30 <= grew <= 33
    # The last request ends a little after 500 s; 600 s must pass after that.
    assert targets[-1][1] > 1


@pytest.mark.parametrize("shape", ["burst", "priority burst"])
def test_a_trace_comes_out_the_same_every_time_and_as_it_says(shape):
    trace = Trace(shape, 2, 10.0)
    first, again = list(trace.requests()), list(trace.requests())
    assert first == again != list(replace(trace, seed=2).requests())
    busy = sum(service_s for _, _, service_s in first)
    steps = range(0, int(trace.seconds), 10)
    level = sum(part * trace.level(rank, now) for now in steps for rank, part in enumerate(MIX))
    expected = 2 * SLOTS * level * 10
    assert busy == pytest.approx(expected, rel=0.1)


def test_a_burst_of_priority_is_met_by_our_policy_with_less():
    trace = Trace("priority burst", 4, 10.0)
    fleet = Fleet(SLOTS, trace.start_s, 2, 8, trace.control_s)
    rows = []
    for policy in (PriorityAware(ScalingSettings(), 8), ServesOwn(0.7 * SLOTS, 8)):
        outcome = run(policy, trace.requests(), 3000.0, fleet)
        assert outcome.quantile(0, 0.99) < 1
        rows.append(outcome.replica_s)
    assert rows[0] < 0.85 * rows[1]


def test_foresight_is_ready_when_a_burst_comes_and_gone_when_it_is_over():
    trace = Trace("priority burst", 4, 60.0)
    fleet = Fleet(SLOTS, trace.start_s, 2, 8, trace.control_s)
    outcome = run(Foresight(trace, ScalingSettings(), 8, 0.1), trace.requests(), 3000.0, fleet)
    sizes = {int(now): replicas for now, replicas, _ in outcome.history}
    assert sizes[1130] == sizes[600] < sizes[1150] == sizes[1700]
    assert outcome.quantile(0, 0.99) < 1
    # It starts nothing for the next burst before that is as near as a start takes.
    assert sizes[2900] == sizes[600]


def row(policy, hours, violations):
    return Row("trace", policy, hours, 0, 0, 100, violations, 0, 1, 0, 1, 0, [])


@pytest.mark.parametrize(
    ("ours", "other", "met"),
    [
        ((70, 5), (100, 5), True),
        ((70, 6), (100, 5), False),
        ((71, 5), (100, 5), False),
        ((100, 1), (100, 5), True),
        ((110, 1), (100, 5), False),
        ((100, 0), (100, 0), False),
    ],
)
def test_goals_are_as_they_were_set(ours, other, met):
    assert verdict(row(OURS, *ours), row("Serve 70%", *other))[0] is met


def test_in_hindsight_the_cheapest_that_is_as_good_counts():
    rows = [row(OURS, 50, 5), row("Serve 40%", 90, 0), row("Serve 70%", 60, 5),
            row("Serve 100%", 40, 9), row("fixed", 10, 0)]  # fmt: skip
    best = hindsight(rows)
    assert best and best.policy == "Serve 70%"
    assert hindsight([rows[0], rows[3]]) is None
