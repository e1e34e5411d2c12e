"""The demand of a model, put together from its ingresses' reports."""

import pytest

from app.config.scaling import ScalingSettings
from app.contracts.credits import Demand
from app.contracts.stats import IngressBoard
from app.core.tiers import Tier
from app.flow.request import QueuedRequest, RequestState
from app.flow.stats import Tally
from app.scaling.demand import DemandBook
from app.scaling.report import PoolReport

pytestmark = pytest.mark.unit

P, D, F = Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX
POOLS = {"pool": PoolReport(8)}
SETTINGS = ScalingSettings(default_wait_s=3)


class Ingress:
    def __init__(self, name):
        self.name, self.tally = name, Tally()

    def serve(self, tier, times, seconds):
        for _ in range(times):
            request = QueuedRequest(tier, "", 1, state=RequestState.PLACED, placed=10.0)
            self.tally.arrive(request)
            self.tally.end(request, 10.0 + seconds)

    def board(self, *, waiting=0, running=0, oldest_s=0.0):
        def tiers(value):
            return dict.fromkeys(Tier, value)

        report = self.tally.report(0.0, headroom=0, grants_per_s=tiers(0.0))
        demand = Demand(
            self.name, 1, 0.0, "", 0, {}, tiers(running), tiers(waiting), tiers(oldest_s), 0
        )
        return IngressBoard(demand, report)


def test_demands_add_up_and_the_oldest_counts():
    book = DemandBook()
    boards = [
        Ingress("one").board(waiting=2, running=3, oldest_s=1.0),
        Ingress("two").board(waiting=1, running=4, oldest_s=5.0),
    ]
    told = book.report(boards, POOLS, 0.2, SETTINGS, {})
    assert (told.tiers[D].waiting, told.tiers[D].running, told.tiers[D].oldest_s) == (3, 7, 5.0)
    assert (told.pools, told.headroom, told.settings) == (POOLS, 0.2, SETTINGS)


def test_counts_grow_with_ingresses_and_stay_when_these_are_gone():
    book, one, two = DemandBook(), Ingress("one"), Ingress("two")
    one.serve(P, 100, 1.0)
    first = book.report([one.board(), two.board()], POOLS, 0.1, SETTINGS, {}).tiers[P]
    assert (first.arrived, first.finished) == (0, 0), "what came before is not counted"
    one.serve(P, 2, 3.0)
    two.serve(P, 1, 4.0)
    second = book.report([one.board(), two.board()], POOLS, 0.1, SETTINGS, {}).tiers[P]
    assert (second.arrived, second.finished, second.served_s) == (3, 3, 10.0)
    third = book.report([two.board()], POOLS, 0.1, SETTINGS, {}).tiers[P]
    assert third.arrived == 3
    two.serve(P, 1, 4.0)
    assert book.report([two.board()], POOLS, 0.1, SETTINGS, {}).tiers[P].arrived == 4
