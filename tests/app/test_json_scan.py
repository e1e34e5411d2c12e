import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dialect import Dialect, Route
from app.errors import InvalidRequest
from app.json_depth import MAX_DEPTH
from app.json_members import LONGEST_PARSED
from app.json_scan import run
from app.openai_api import parse_request, read_request, rewrite_request
from app.raw_json import RawJson
from app.tiers import Tier

pytestmark = pytest.mark.unit

PLAIN = Dialect("plain")
TEXT = st.text(st.sampled_from('ab"\\[]{},: ä語\n'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["service_tier", "priority", "stream", "n", "messages", "x", 'q"\\'])


@st.composite
def documents(draw):
    """Objects with names that come more than once, some written with escapes, and mutations."""
    pairs = draw(st.lists(st.tuples(NAMES, VALUES), max_size=6))
    pairs.append(("model", "m"))
    escaped = draw(st.booleans())
    members = []
    for name, value in pairs:
        written = json.dumps(name)
        if escaped:
            written = '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
        members.append(f"{written} :{json.dumps(value, ensure_ascii=draw(st.booleans()))}")
    body = ("{" + " , ".join(members) + "}").encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(body)))
        cut = draw(st.integers(0, 2))
        added = draw(st.sampled_from([b"", b'"', b"\\", b"}", b"[", b"\xff", b",", b"NaN", b"x"]))
        body = body[:at] + added + body[at + cut :]
    return body


def outcome(read):
    try:
        request = read()
    except InvalidRequest as error:
        return error.status, error.param, error.code
    sent = orjson.loads(b"".join(bytes(part) for part in pieces(request)))
    return request.model, request.requested_tier, request.stream, request.prefix, sent


def pieces(request):
    sent = rewrite_request(request, "org/m", PLAIN, Tier.DEFAULT)
    return [sent] if isinstance(sent, bytes) else sent


@given(documents())
def test_a_scanned_request_is_the_same_as_a_parsed_one(body):
    scanned = outcome(lambda: run(read_request(Route.CHAT, memoryview(body))))
    assert scanned == outcome(lambda: parse_request(Route.CHAT, body))


@given(documents())
def test_it_is_so_too_behind_a_member_of_many_slices(body):
    if not body.startswith(b"{"):
        return
    filler = b'{"big":["' + b'\\"[{\\\\' * (LONGEST_PARSED // 3) + b'",{"priority":1}],'
    scanned = outcome(lambda: run(read_request(Route.CHAT, memoryview(filler + body[1:]))))
    parsed = outcome(lambda: parse_request(Route.CHAT, body))
    if isinstance(scanned[-1], dict):
        assert len(scanned[-1].pop("big")) == 2
    assert scanned == parsed


@pytest.mark.parametrize("name", ["tools", "response_format", "messages", "query"])
@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("depth", [252, 600, 1023, 5000, 200_000])
def test_deep_nesting_is_refused_in_every_place(route, name, depth):
    body = b'{"model":"m","%b":%b}' % (name.encode(), b"[" * depth + b"]" * depth)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_DEPTH} levels"):
        parse_request(route, body)


def test_a_long_member_stays_bytes():
    body = orjson.dumps({"model": "m", "messages": ["x" * LONGEST_PARSED]})
    assert isinstance(run(read_request(Route.CHAT, memoryview(body))).fields["messages"], RawJson)
