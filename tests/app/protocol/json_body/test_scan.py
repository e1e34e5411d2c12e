import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Dialect, Route
from app.core.errors import InvalidRequest
from app.core.tiers import Tier
from app.protocol.json_body.depth import MAX_DEPTH
from app.protocol.json_body.members import LONGEST_PARSED
from app.protocol.json_body.raw import RawJson
from app.protocol.json_body.scan import MOST_MEMBERS, run
from app.protocol.requests import parse_request, read_request, rewrite_request

pytestmark = pytest.mark.unit

TEXT = st.text(st.sampled_from('ab"\\[]{},: ä語\n'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "service_tier",
        "priority",
        "stream",
        "stream_options",
        "background",
        "fail_fast",
        "n",
        "max_tokens",
        "messages",
        "prompt",
        "input",
        "instructions",
        "x",
        'q"\\',
    ]
)
FEW_FIELDS = frozenset({"model", "messages", "prompt", "input", "n", "priority"})
DIALECTS = [
    Dialect("plain"),
    Dialect(
        "native",
        priority_values=dict.fromkeys(Tier, 7),
        priority_routes=frozenset(Route),
        stream_options={"include_usage": True},
    ),
    Dialect(
        "strict",
        priority_values=dict.fromkeys(Tier, 7),
        priority_routes=frozenset(Route),
        accepted_fields=dict.fromkeys(Route, FEW_FIELDS),
    ),
    Dialect("mute", accepted_fields=dict.fromkeys(Route, frozenset())),
]
LEVELS = st.sampled_from([0, 0, 0, 97, 98, 99, 100, 253, 300, 1100])


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
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
        # Of several members of one name a parser forgets the first ones, with their depth.
        levels = draw(LEVELS) if [n for n, _ in pairs].count(name) == 1 else 0
        members.append(f"{written} :{'[' * levels}{text}{']' * levels}")
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
        return error.status, error.param, error.code, error.message
    sent = [orjson.loads(sent_to(request, dialect)) for dialect in DIALECTS]
    kept = request.fields
    return request._replace(fields={}), {name: kept[name] for name in kept}, sent


def sent_to(request, dialect):
    sent = rewrite_request(request, "org/m", dialect, Tier.DEFAULT)
    return sent if isinstance(sent, bytes) else b"".join(sent)


@given(documents(), st.sampled_from(Route))
def test_a_scanned_request_is_the_same_as_a_parsed_one(body, route):
    scanned = outcome(lambda: run(read_request(route, memoryview(body))))
    assert scanned == outcome(lambda: parse_request(route, body))


@given(documents(), st.sampled_from(Route))
def test_it_is_so_too_behind_a_member_of_many_slices(body, route):
    if not body.startswith(b"{"):
        return
    filler = b'{"big":["' + b'\\"[{\\\\' * (LONGEST_PARSED // 3) + b'",{"priority":1}],'
    whole = filler + body[1:]
    scanned = outcome(lambda: run(read_request(route, memoryview(whole))))
    parsed = outcome(lambda: parse_request(route, b'{"big":0,' + body[1:]))
    if len(scanned) == 3:
        request, fields, sent = scanned
        assert isinstance(fields.pop("big"), RawJson)
        assert [len(one.pop("big")) for one in sent[:2]] == [2, 2]
        assert request.length == len(whole)
        request, fields, sent = parsed
        assert [fields.pop("big"), *(one.pop("big") for one in sent[:2])] == [0, 0, 0]
        scanned, parsed = scanned[1:], parsed[1:]
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


SHAPES = [b"a", b'\\"', b"[],", b"[[[]]],", b"{},", b'"a",', b"[" * 90 + b"]" * 90 + b",", b" "]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_slice_is_long(shape):
    """A slice ends after so many bytes, and the sooner the more brackets there are."""
    length = 1024 * 1024
    filler = shape * (length // len(shape))
    opening, end = (b'["', b'"]') if shape[:1] in b"a\\" else (b"[", b"0]")
    body = b'{"model":"m","messages":%b%b%b}' % (opening, filler, end)
    steps = sum(1 for _ in read_request(Route.CHAT, memoryview(body)))
    brackets = sum(map(filler.count, (b"[", b"]", b"{", b"}")))
    assert steps >= (length + 8 * brackets) // (192 * 1024)


def test_too_many_members_are_refused():
    def body(count):
        names = b"".join(b'"n%d":"%b",' % (n, b"x" * 10) for n in range(count))
        return b"{%b" % names + b'"model":"m"}'

    for padding in (b"", b" " * 400_000):
        assert parse_request(Route.CHAT, body(MOST_MEMBERS - 1) + padding).model == "m"
        with pytest.raises(InvalidRequest, match="at most 4096 fields"):
            parse_request(Route.CHAT, body(MOST_MEMBERS) + padding)
