import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.protocol.json_body.depth import (
    MAX_DEPTH,
    blank_escapes,
    brackets,
    first_return,
    is_parsed_too_deep,
    is_too_deep,
    levels,
)

pytestmark = pytest.mark.unit

TEXT = st.text(st.sampled_from('ab"\\[]{},: ä語\n'), max_size=8)
VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def depth(value):
    if not isinstance(value, list | dict):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, items), default=0)


def wrapped(value, times):
    for number in range(times):
        value = [value, "]"] if number % 2 else {'"[': value}
    return value


@given(VALUES, st.integers(90, 105), st.integers(0, 600))
@example([], 99, 600)
def test_more_levels_than_may_be_are_found(value, times, padding):
    value = [*([[]] * padding), *([[[]]] * padding), wrapped(value, times)]
    too_deep = depth(value) > MAX_DEPTH
    assert is_too_deep(orjson.dumps(value)) == too_deep
    assert is_parsed_too_deep(value) == too_deep


SIGNS = st.lists(st.sampled_from([b"[", b"]", b"{}", b"[]", b"[[]]"]), max_size=900).map(b"".join)


@given(SIGNS, st.integers(0, 110))
@example(b"[]" * 2000, 100)
@example(b"[[[[]]]]" * 500, 96)
@example(b"[[[[]]]]" * 500, 97)
def test_the_levels_of_brackets(signs, start):
    depths = [start]
    for sign in signs:
        depths.append(depths[-1] + (1 if sign in b"[{" else -1))
    lowest, highest, last = levels(brackets(signs, inside=False)[0], start)
    assert (lowest, last) == (min(depths), depths[-1])
    assert (highest > MAX_DEPTH) == (max(depths) > MAX_DEPTH)
    assert highest >= max(depths)


@given(TEXT, st.integers(0, 30))
def test_only_brackets_outside_strings_count(text, cut):
    written = orjson.dumps([text, {}])
    plain, used = blank_escapes(written)
    assert used == len(written) == len(plain)
    assert brackets(plain, inside=False) == (b"\x01\x01\xff\xff", False)
    # A chunk may end anywhere, also in an escape.
    first, used = blank_escapes(written[: cut % len(written)])
    second, _ = blank_escapes(written[used:])
    signs, inside = brackets(first, inside=False)
    assert inside == (first.count(b'"') % 2 == 1)
    more, inside = brackets(second, inside)
    assert (signs + more, inside) == (b"\x01\x01\xff\xff", False)


def test_the_end_of_an_object_is_after_its_own_bracket():
    assert first_return(b'"]",[[]]]]]', 2, inside=False) == (9, 4)
    assert first_return(b']"]]', 2, inside=True) == (3, 2)
