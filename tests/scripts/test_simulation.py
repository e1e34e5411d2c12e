from dataclasses import replace

import pytest

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from scripts.bench.simulate import distance, markdown
from scripts.bench.simulation import Outcome, Scenario, Simulation, arrivals

pytestmark = pytest.mark.unit

SMALL = Scenario(ingresses=4, replicas=4, load=2.0, bursty=True, seconds=60.0, service_s=2.0)


def simulate(scenario, *, ideal=False):
    return Simulation(scenario, QueueSettings(), ideal=ideal).run()


def served(outcome):
    return sum(map(len, outcome.waits.values()))


@pytest.fixture(scope="module")
def small():
    return simulate(SMALL, ideal=True), simulate(SMALL)


def test_a_scenario_comes_out_the_same_every_time(small):
    again = simulate(SMALL)
    assert again == small[1]
    other = simulate(replace(SMALL, seed=2))
    assert other.waits != again.waits


def test_one_ingress_is_the_ideal_line():
    one = replace(SMALL, ingresses=1)
    ideal, ours = simulate(one, ideal=True), simulate(one)
    assert (ours.waits, ours.shed, ours.busy) == (ideal.waits, ideal.shed, ideal.busy)


def test_engines_never_hold_more_than_their_slots(small):
    for outcome in small:
        assert outcome.most_queued == 0
        assert 0.8 < outcome.busy <= 1


def test_every_request_is_served_or_shed_or_still_there(small):
    coming = sum(arrival.at >= SMALL.warm_up_s for arrival in arrivals(SMALL))
    for outcome in small:
        ended = served(outcome) + sum(outcome.shed.values())
        # Who waited when counting began is counted too, once served; who waits at the end is not.
        assert 0.25 * coming < ended < 1.5 * coming


def test_priority_hardly_waits_while_the_others_do(small):
    for outcome in small:
        assert outcome.wait(Tier.PRIORITY, 0.5) < 0.05
        assert outcome.wait(Tier.DEFAULT, 0.5) > 1


def test_a_slower_network_makes_priority_wait_longer(small):
    slow = simulate(replace(SMALL, network_s=0.3, wake=False))
    assert slow.wait(Tier.PRIORITY, 0.99) > small[1].wait(Tier.PRIORITY, 0.99)


def test_the_distance_is_told_as_it_is():
    def with_p99(wait_s):
        outcome = Outcome()
        outcome.waits[Tier.PRIORITY] = [wait_s]
        return outcome

    assert distance(with_p99(1.09), with_p99(1.0)) == "within 10%"
    assert distance(with_p99(1.2), with_p99(1.0)) == "+200 ms (+20%)"
    assert distance(with_p99(0.02), with_p99(0.0)) == "+20 ms"


def test_the_table_has_a_pair_of_rows_for_a_scenario(small):
    lines = markdown([(SMALL, *small)]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 4 x 4, 200%, bursts | ideal |")
