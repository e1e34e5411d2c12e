import pytest

from app.core.tiers import Tier
from app.observe.observers import Observers
from scripts.bench.metrics_cost import World, per_request_us, row

pytestmark = pytest.mark.unit


def test_every_request_of_the_benchmark_is_counted():
    world = World(2)
    assert per_request_us(world.observers, world.ends) > 0
    assert per_request_us(Observers(), world.ends) >= 0
    for model in world.models:
        counted = world.tallies.of(model)
        assert counted.requests == len(world.ends) / 2
        assert {tier: one.met + one.missed for tier, one in counted.slo.items()} == dict.fromkeys(
            Tier, counted.requests / 3
        )


def test_a_row_has_what_was_pushed():
    cells = [cell.strip() for cell in row(1, 1).strip("|").split("|")]
    assert cells[0] == "1" and int(cells[1]) > 200 and cells[-1].endswith("%")
