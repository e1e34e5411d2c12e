import asyncio

import orjson
import pytest

from app.contracts.news import ModelNews
from app.contracts.speeds import Speeds, TierSpeed
from app.core.tiers import Tier
from app.web.speed_reader import KEPT_S, UNKNOWN, SpeedReader

pytestmark = pytest.mark.unit

QUICK = Speeds(300.0, {tier: TierSpeed(3, 0.1, 0.2, 50.0) for tier in Tier})


class Source:
    """A Model whose state a test sets; ``None`` while it is away."""

    def __init__(self, state):
        self.state, self.asked = state, []

    async def news_of(self, model, seen):
        self.asked.append(seen)
        await asyncio.sleep(0)
        if self.state is None:
            return None
        return ModelNews("life", 7, orjson.dumps(self.state), (b"[1]",), ())


@pytest.fixture
def clock():
    return [100.0]


def reader(source, clock):
    return SpeedReader(source, lambda: clock[0])


async def test_a_model_is_asked_once_however_many_look(clock):
    source = Source({"speeds": QUICK.to_fields(), "replicas": ["secret"]})
    it = reader(source, clock)
    found = await asyncio.gather(*(it.read("m") for _ in range(50)))
    assert found == [QUICK] * 50 and source.asked == [("", 0)]
    clock[0] += KEPT_S
    await asyncio.gather(*(it.read("m") for _ in range(50)))
    assert source.asked == [("", 0), ("life", 7)], "the history is not fetched again"


@pytest.mark.parametrize("state", [None, {}, {"speeds": None}])
async def test_nothing_is_known_of_a_model_that_reports_none(clock, state):
    source = Source({"speeds": QUICK.to_fields()})
    it = reader(source, clock)
    assert await it.read("m") == QUICK
    source.state = state
    clock[0] += KEPT_S
    assert await it.read("m") == UNKNOWN
