from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.sse import Event, EventReader, parse_block

pytestmark = pytest.mark.unit

names = st.sampled_from([b"", b"response.created", b"error"])
lines = st.binary(max_size=30).map(lambda b: b.replace(b"\r", b" ").replace(b"\n", b" "))
events = st.builds(Event, st.lists(lines, min_size=1, max_size=3).map(b"\n".join), names)


def completed(reader, piece):
    """Return the events that a piece completes."""
    return [event for block in reader.blocks(piece) if (event := parse_block(block))]


def cut(text: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(st.lists(events), st.lists(st.integers(0, 10_000)), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_survive_any_cutting_and_any_line_ending(sent, places, ending):
    wire = b"".join(event.encode() for event in sent).replace(b"\n", ending)
    reader = EventReader()
    # A final CR may be half of a CR LF, so the reader waits for what follows it.
    read = [event for piece in cut(wire, places) for event in completed(reader, piece)]
    read += completed(reader, b"\n") if sent and ending == b"\r" else []
    assert read == sent
    assert reader.blocks(b"x\n\n") == [b"x"], "nothing is left of them"


@given(st.text("\n\n\na:", max_size=12).map(str.encode))
def test_blocks_stand_between_empty_lines(text):
    reader = EventReader()
    # What follows the last empty line waits for its own.
    blocks = reader.blocks(text) + reader.blocks(b"x\n\n")
    assert blocks == (text + b"x\n\n").split(b"\n\n")[:-1]


def test_comments_and_empty_events_are_dropped():
    wire = b": keep-alive\n\nid: 3\n\ndata:x\n\n\n\ndata: y\nretry: 1\n\n"
    assert [event.data for event in completed(EventReader(), wire)] == [b"x", b"y"]


def test_an_event_without_its_end_waits_for_it():
    reader = EventReader()
    assert reader.blocks(b"data: {") == []
    assert completed(reader, b"}\n\n") == [Event(b"{}")]
