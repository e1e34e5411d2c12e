import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.json_body.raw import RawJson

pytestmark = pytest.mark.unit

data = st.lists(st.sampled_from([b"ab", b"a", b"b", b"c" * 511, b"c" * 300_000]), max_size=6)


@given(data.map(b"".join), st.sampled_from([b"a", b"ab", b"abb"]), st.integers(0, 700))
def test_it_is_searched_as_bytes_are(data, needle, start):
    raw = RawJson(data)
    for end in (None, start, start + 512, len(data) - 1):
        if end is None or end >= 0:
            assert raw.find(needle, start, end) == data.find(needle, start, end)
    assert raw.startswith(needle, start) == data.startswith(needle, start)
    assert raw.count(b"a", 600_000) == data.count(b"a", 0, 600_000)
    assert len(raw) == len(data)


parts = st.sampled_from([b"data", b'"', b"d", b"at", b"c" * 510, b"c" * 16_384, b"c" * 40_000])


@given(st.lists(parts, max_size=9).map(b"".join), st.integers(0, 1200), st.integers(0, 60_000))
def test_what_is_beside_a_byte_is_found(data, start, length):
    found, at, end = [], start, start + length
    while (at := RawJson(data).find(b"data", at, end, beside=b'"')) >= 0:
        found.append(at)
        at += 1
    every = [at for at in range(start, min(end, len(data)) - 3) if data.startswith(b"data", at)]
    beside = {at for at in every if b'"' in (data[max(at - 1, 0) : at], data[at + 4 : at + 5])}
    assert beside <= set(found) <= set(every)
