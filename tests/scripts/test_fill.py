import pytest

from scripts.bench.fill import (
    FLEX,
    ORDER,
    WITH,
    WITHOUT,
    FillTrial,
    clients_of,
    markdown,
    rows_of,
    write,
)
from scripts.bench.load import Answer
from scripts.bench.trial import Window

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("slots", [2, 8, 32])
def test_default_and_priority_take_half_the_slots_and_flex_more_than_all(slots):
    without, with_flex = clients_of(WITHOUT, slots), clients_of(WITH, slots)
    assert sum(without.values()) == max(2, slots // 2) and min(without.values()) > 0
    assert with_flex == without | clients_of(FLEX, slots)
    assert clients_of(FLEX, slots) == {"flex": 2 * slots}


def test_drift_falls_on_both_sides():
    assert ORDER.count(WITH) == ORDER.count(WITHOUT) == 2
    assert ORDER[1:] == ORDER[:0:-1]


def answers(tier, start, tokens):
    """One answer of so many tokens in the ten seconds from ``start`` on."""
    moments = [start + 10 * number / tokens for number in range(tokens)]
    return Answer(tier, start - 0.5, start, start + 10, tokens, tokens, moments)


def test_flex_is_compared_with_what_the_others_leave_idle(tmp_path):
    phases = {FLEX: Window(0, 10), WITHOUT: Window(10, 20), WITH: Window(20, 30)}
    trial = FillTrial("it", [], windows={phase: [window] for phase, window in phases.items()})
    trial.answers += [answers("flex", 0, 100), answers("flex", 20, 45)]
    for start in (10, 20):
        trial.answers += [answers("priority", start, 10), answers("default", start, 40)]
    rows = {(row.tier, row.phase): row for row in rows_of(trial)}
    assert rows["default", WITHOUT].tokens_per_s == pytest.approx(4)
    assert rows["default", WITH].tokens_per_s == pytest.approx(4)
    assert rows["priority", WITH].ttft_p99 == 0.5
    assert rows["flex", WITH].used == pytest.approx(4.5 / (10 - 1 - 4))
    assert rows["flex", FLEX].used is None
    write(tmp_path / "r.json", {}, list(rows.values()))
    assert "| 90.0% |" in (tmp_path / "r.md").read_text()
    assert markdown(list(rows.values())).count("\n") == 7
