import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.sse import EventReader
from app.upstream.preemptions import EngineEvents, read_count

pytestmark = pytest.mark.unit

EVENTS = [b"data: {}", b": ping", b"event: a\ndata: b", b": frontline-preemptions", b"data: [DONE]"]


@given(
    st.lists(st.sampled_from(EVENTS) | st.integers(0, 999_999), max_size=8),
    st.lists(st.integers(0, 300), max_size=8),
    st.none() | st.just(0),
)
def test_counts_are_taken_out_of_a_stream_however_it_is_cut(blocks, cuts, at_first):
    wire = b"".join(
        (block if isinstance(block, bytes) else b": frontline-preemptions %d" % block) + b"\n\n"
        for block in blocks
    )
    reader, got, place = EngineEvents(at_first), [], 0
    for cut in [*sorted(cuts), len(wire)]:
        got += reader.blocks(wire[place:cut])
        place = max(place, min(cut, len(wire)))
    assert got == [block for block in blocks if isinstance(block, bytes)]
    counts = [block for block in blocks if isinstance(block, int)]
    assert reader.preemptions == (counts[-1] if counts else at_first)


@pytest.mark.parametrize("text", [b"", b"-1", b"1.5", b"1" * 7, b"one", b"\xb2"])
def test_what_is_no_count_is_none(text):
    assert read_count(text) is None and read_count(b" 12 ") == 12
    reader, block = EngineEvents(None), b": frontline-preemptions " + text
    assert reader.blocks(block + b"\n\n") == EventReader().blocks(block + b"\n\n")
    assert reader.preemptions is None
