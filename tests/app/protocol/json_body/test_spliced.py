import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.json_body.spliced import Spliced

pytestmark = pytest.mark.unit

VALUES = st.integers(-9, 9) | st.text(max_size=3)
objects = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)


@given(objects)
def test_it_is_the_object_of_all_its_members(own):
    rest = [memoryview(b'"~x":[1]'), memoryview(b'"~y":2 , "~z":3')]
    for parts in (rest, rest[:1], []):
        spliced = Spliced.of(orjson.dumps(own), parts)
        for _ in range(2):  # it may have to be sent again
            whole = b"".join(spliced)
            assert len(whole) == len(spliced)
            expected = {**own, **orjson.loads(b"{%b}" % b",".join(parts))}
            assert orjson.loads(whole) == expected


def test_no_piece_is_long():
    spliced = Spliced.of(b'{"a":1}', [memoryview(b'"x":"%b"' % (b"y" * 1_000_000))])
    assert max(map(len, spliced)) <= 256 * 1024
