import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import alarms
from app.contracts.start import PoolStart, StartReport, note_of
from deployments.control.pool_starts import IDLE_S, STALE_S, PoolStarts

pytestmark = pytest.mark.unit


def note(at, phase="compiling", pool="pool"):
    return note_of(StartReport("m", pool, 5.0, 30.0, phase), at)


def start(phase="compiling", pool="pool"):
    return PoolStart(phase, 5.0, 30.0, pool)


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "loading 4 %", "compiling"]))
    )
)
def test_every_replica_is_shown_from_its_first_note_until_it_removes_it(looks):
    """a94f7f2: one note for each pool, so that of two replicas one was shown, now this, now that,
    and none once the first was ready."""
    starts = PoolStarts()
    assert starts.current(0.0) == {}
    for now, phases in enumerate(looks):
        notes = {name: note(now, phase) for name, phase in phases.items()}
        assert starts.take(notes, float(now)) == []
        assert starts.current(float(now)) == {one: start(phase) for one, phase in phases.items()}


def test_notes_are_read_rarely_while_nothing_starts():
    """02dedda: every second."""
    starts, clock = PoolStarts(), itertools.count()

    def reads(seconds, names=(), *, awaited=False):
        """How often they are read in the next so many seconds, looking once in each."""
        count = 0
        for now in itertools.islice(clock, seconds):
            if starts.due(float(now), awaited=awaited):
                starts.take({name: note(now) for name in names}, float(now))
                count += 1
        return count

    assert reads(1) == 1, "a Model that starts reads them at once"
    assert reads(60) == 60 / IDLE_S
    assert reads(60, awaited=True) == 60
    # A further replica starts: it is found soon, then watched until it has removed its note.
    assert 60 - IDLE_S < reads(60, {"a"}) <= 60
    assert reads(60) == 60 / IDLE_S


def test_a_start_of_which_nothing_is_heard_is_not_shown_for_long_and_its_note_is_removed():
    starts = PoolStarts()
    for at in (0.0, STALE_S / 2, STALE_S - 0.1):
        assert starts.take({"killed": note(0.0), "other": note(at)}, at) == []
        assert len(starts.current(at)) == 2
    assert starts.take({"killed": note(0.0), "other": note(STALE_S)}, STALE_S) == ["killed"]
    assert starts.current(STALE_S) == {"other": start()}
    # It was only slow. The clocks of nodes differ; that the note changes is what counts.
    assert starts.take({"killed": note(-100.0)}, STALE_S + 5) == []
    assert starts.current(STALE_S + 5) == {"killed": start()}


def test_a_note_of_another_version_is_no_start_and_hides_none():
    """a94f7f2: it ended the reading of all others, every second."""
    starts, before = PoolStarts(), alarms.PROCESS.counts().get("start report", 0)
    others = [b"{}", b"[]", b'{"start": {"more": 1}}', b'{"start": null}', b"nonsense"]
    notes = {str(n): other for n, other in enumerate(others)} | {"a": note(0.0)}
    for now in (0.0, 1.0):
        assert starts.take(notes, now) == []
        assert starts.current(now) == {"a": start()}
    assert alarms.PROCESS.counts()["start report"] == before + len(others)
    assert set(starts.take(notes | {"a": note(1.0)}, STALE_S)) == {*notes} - {"a"}


def test_an_application_takes_no_notes_of_another():
    names = [PoolStart.note_name(application, "r1") for application in ("a", "a/b", "ab")]
    for application in ("a", "a/b", "ab"):
        prefix = PoolStart.note_prefix(application)
        assert len([name for name in names if name.startswith(prefix)]) == 1
