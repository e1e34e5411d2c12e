"""The JSON object of a request, against what ``json.loads`` finds in the same bytes."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.core.errors import InvalidRequest
from app.protocol.json_body.depth import MAX_DEPTH
from app.protocol.json_body.parse import FEW, is_sparse, parse_plain, scan_object
from app.protocol.json_body.scan import MOST_MEMBERS, run

pytestmark = pytest.mark.unit

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=5)


def nested(depth):
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_an_object_has_the_members_that_a_parser_finds(value, ascii_only, indent):
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse_plain(body) == json.loads(body) == dict(run(scan_object(memoryview(body))))


@given(OBJECTS, st.data())
def test_of_any_bytes_nothing_is_read_that_a_parser_does_not_find(value, data):
    body = bytearray(json.dumps(value, ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    for read in (parse_plain, lambda text: dict(run(scan_object(memoryview(text))))):
        try:
            found = read(bytes(body))
        except InvalidRequest as error:
            assert error.status == 400
        else:
            assert found is None or found == json.loads(body)


@given(VALUES.filter(lambda value: not isinstance(value, dict)))
@example([{}])
def test_what_is_no_object_is_refused(value):
    body = json.dumps(value).encode()
    assert parse_plain(body) is None, "the scanner decides"
    with pytest.raises(InvalidRequest, match="must be an object"):
        run(scan_object(memoryview(body)))


@pytest.mark.parametrize("depth", [2, MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1, 254, 2000])
@pytest.mark.parametrize("beside", [0, 200, 5000])
def test_the_deepest_that_is_accepted(depth, beside):
    body = nested(depth)[:-1] + b',"b":[' + b"[]," * beside + b"0]}"
    found = parse_plain(body)
    assert (found is not None) == (depth <= MAX_DEPTH)
    if found is None:
        with pytest.raises(InvalidRequest, match="nested too deeply") as caught:
            run(scan_object(memoryview(body)))
        assert caught.value.param == "a"
    else:
        assert found == json.loads(body)


def test_too_many_members_are_left_to_the_scanner():
    body = json.dumps({f"n{number}": 0 for number in range(MOST_MEMBERS + 1)}).encode()
    assert parse_plain(body) is None
    with pytest.raises(InvalidRequest, match="at most 4096 fields"):
        run(scan_object(memoryview(body)))


@given(
    st.integers(0, 400),
    st.integers(0, 400),
    st.binary(max_size=40).map(lambda text: text.replace(b"{", b"").replace(b"[", b"")),
)
@example(512, 0, b"")
@example(256, 256, b",")
@example(256, 257, b",")
def test_a_sparse_document_has_few_opening_brackets(arrays, objects, between):
    body = between.join([b"[", b"]"] * arrays + [b"{", b"}"] * objects)
    assert is_sparse(body) == (arrays + objects <= FEW)
