import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.ledger.backlog import Backlog, Lag, backlog_between
from app.ledger.journal import Position

pytestmark = pytest.mark.unit


def test_the_size_spans_segments():
    ends = {1: 100, 2: 70}
    assert backlog_between(Position(1, 40), Position(3, 5), ends).size == 60 + 70 + 5
    assert backlog_between(Position(2, 10), Position(2, 50), ends).size == 40
    assert backlog_between(Position(2, 50), Position(2, 50), ends).size == 0


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=60))
def test_the_lag_is_the_age_of_the_oldest_entry_to_a_second(steps):
    """Each second something is written, or not, and the store takes all of it, or nothing."""
    lag, written, moved, since = Lag(), 0, 0, {}
    for now, (added, flushes) in enumerate(steps):
        if added:
            written += added
            since[written] = now
        if flushes:
            moved = written
        backlog = Backlog(Position(1, moved), Position(1, written), written - moved)
        waiting = [at for end, at in since.items() if end > moved]
        assert lag.seconds(backlog, now) == (now - min(waiting) if waiting else 0)


def test_a_long_outage_needs_little_memory_and_keeps_its_age():
    lag = Lag()
    for now in range(5000):
        seconds = lag.seconds(Backlog(Position(1, 0), Position(1, now + 1), now + 1), now)
        assert seconds == now


def test_another_journal_starts_anew():
    lag = Lag()
    lag.seconds(Backlog(Position(4, 0), Position(4, 9), 9), 0.0)
    assert lag.seconds(Backlog(Position(1, 0), Position(1, 2), 2), 50.0) == 0.0
