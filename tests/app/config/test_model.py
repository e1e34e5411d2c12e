"""The settings of a model's pools."""

import pytest

from app.config.model import FALLBACK_SLOTS, MOST_AUTO_SLOTS, PoolSettings
from app.core.settings import SettingsError

pytestmark = pytest.mark.unit


def pool(**settings):
    return PoolSettings.load({"name": "p", "engine": "vllm", "model": "m", **settings}, "pool")


def test_slots_are_a_number_or_auto():
    assert pool().slots == pool().most_slots == FALLBACK_SLOTS
    assert pool(slots=65536).most_slots == 65536
    assert pool(slots="auto").slots == "auto"
    assert pool(slots="auto").most_slots == MOST_AUTO_SLOTS


@pytest.mark.parametrize("slots", ["Auto", "many", "", 0, -1, 65537, 1.5, None, [8], "8.5"])
def test_anything_else_is_refused_in_one_sentence(slots):
    with pytest.raises(SettingsError) as caught:
        pool(slots=slots)
    [problem] = caught.value.problems
    assert problem.key == ("pool", "slots")
    assert problem.message == (f"expected a whole number from 1 to 65536, or auto (got {slots!r})")
