import pytest

from app.config.slo import SloSettings
from app.contracts.slo import attainments
from app.contracts.traffic import Attainment
from app.core.tiers import Tier

pytestmark = pytest.mark.unit

SLO = SloSettings.load(
    {"priority": {"ttft_ms": 400, "p": 0.9}, "flex": {"ttft_ms": 9000}}, "user_config"
)


@pytest.mark.parametrize(
    ("met", "missed", "share", "kept"),
    [(0, 0, None, None), (9, 1, 0.9, True), (8, 2, 0.8, False), (0, 1, 0.0, False)],
)
def test_attainment_is_held_against_the_objective(met, missed, share, kept):
    of = attainments(SLO, {Tier.PRIORITY: Attainment(met, missed)}, 60.0, {})[Tier.PRIORITY]
    assert (of.attained, of.kept, of.objective, of.ttft_ms) == (share, kept, 0.9, 400)


def test_only_tiers_with_an_objective_have_one():
    counted = dict.fromkeys(Tier, Attainment(1, 0))
    of = attainments(SLO, counted, 60.0, counted)
    assert list(of) == [Tier.PRIORITY, Tier.FLEX]
