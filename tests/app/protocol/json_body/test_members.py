"""The members of JSON objects, against what ``json.loads`` finds in the same bytes."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.json_body.members import LONGEST_PARSED, Members, Reparsed
from app.protocol.json_body.raw import RawJson
from app.protocol.json_body.scan import run, scan

pytestmark = pytest.mark.unit

TEXT = st.text(st.sampled_from('ab"\\[]{},: ä語\n'), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT | st.just("x" * LONGEST_PARSED),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["a", "b", 'q"\\', "語", ""])


@st.composite
def objects(draw):
    """Objects whose names may come more than once, with spaces here and there."""
    space = draw(st.sampled_from(["", " ", "\n\t "]))
    ascii_only = draw(st.booleans())
    pairs = draw(st.lists(st.tuples(NAMES, VALUES), max_size=6))
    written = [
        f"{json.dumps(name, ensure_ascii=ascii_only)}{space}:{space}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{space}"
        for name, value in pairs
    ]
    return f"{space}{{{space}{f',{space}'.join(written)}}}{space}".encode()


def scanned(body):
    return run(scan(memoryview(body)))


def plain(value):
    return json.loads(bytes(value.data)) if isinstance(value, RawJson) else value


@given(objects())
def test_each_member_is_what_a_parser_finds(body):
    members, expected = scanned(body), json.loads(body)
    assert {name: plain(members[name]) for name in members} == expected
    assert len(members) == len(expected)
    for name in expected:
        value = members[name]
        # What is long stays as it came, so a text of this length is not parsed.
        assert not isinstance(value, RawJson) or len(value) > LONGEST_PARSED
    assert members.get("not there") is None


@given(objects(), st.sets(NAMES))
def test_the_pieces_of_some_members_are_these_members(body, names):
    members, expected = scanned(body), json.loads(body)
    wanted = [name for name in expected if name in names]
    pieces = members.pieces(wanted)
    found = json.loads(b"{%b}" % b",".join(bytes(piece) for piece in pieces))
    kept = {name: expected[name] for name in wanted if expected[name] is not None}
    assert {name: value for name, value in found.items() if name in kept} == kept
    # Between neighbours nothing of others is taken along.
    assert set(found) <= set(wanted)


def test_neighbours_are_one_piece_and_nulls_part_them():
    members = scanned(b'{"a": 1, "b":2,"c":null,"d":[3] , "e":4}')
    assert isinstance(members, Members)
    pieces = [bytes(piece) for piece in members.pieces(["e", "a", "d", "c", "b"])]
    assert pieces == [b'"a": 1, "b":2', b'"d":[3] , "e":4']


@given(objects())
def test_what_is_parsed_again_is_the_same(body):
    kept, expected = Reparsed(body, orjson.loads(body)), json.loads(body)
    for _ in range(2):
        assert dict(kept) == expected and len(kept) == len(expected)
        assert all(kept[name] == value for name, value in expected.items())
        kept.forget()
