import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.news import PoolChange, ScalingDecision
from app.scaling.decisions import DecisionLog, read_decisions

pytestmark = pytest.mark.unit

DECISIONS = st.builds(
    ScalingDecision,
    st.floats(0, 1e10),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.dictionaries(
        st.text("abc"), st.builds(PoolChange, st.integers(0, 9), st.integers(0, 9), st.just("x"))
    ),
)


@given(st.lists(DECISIONS, max_size=30))
def test_a_note_has_the_latest_decisions(decisions):
    log = DecisionLog()
    for one in decisions:
        log.add(one)
    assert read_decisions(log.to_note()) == decisions[-20:]


def test_there_may_be_no_note():
    assert read_decisions(None) == []
