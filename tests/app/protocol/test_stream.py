import json
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.core.pricing import RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.protocol.requests import parse_request
from app.protocol.sse import Event, EventReader, parse_block
from app.protocol.stream import ChunkStamper, stream_stamper

pytestmark = pytest.mark.unit

CARD = RateCard(input="0.02", cached_input="0.01", output="0.04")
PRIORITY = TierDecision(Tier.PRIORITY, Tier.PRIORITY, None, CARD)


def inbound(route=Route.CHAT, **fields):
    return parse_request(route, json.dumps({"model": "m", **fields}).encode())


def events_of(wire):
    return [event for block in EventReader().blocks(wire) if (event := parse_block(block))]


def chunk(content=None, finish=None, usage=None, index=0):
    fields = {"object": "chat.completion.chunk", "choices": []}
    if content is not None or finish is not None:
        fields["choices"] = [
            {"index": index, "delta": {"content": content}, "finish_reason": finish}
        ]
    if usage is not None:
        fields["usage"] = {"prompt_tokens": 3, "completion_tokens": usage}
    return Event(json.dumps(fields).encode())


DONE = Event(b"[DONE]")
STREAM = [
    chunk("a", usage=1),
    chunk("b", usage=2),
    chunk("", "stop", usage=2),
    chunk(usage=2),
    DONE,
]


def fed(stamper, *events):
    return stamper.feed(EventReader().blocks(b"".join(event.encode() for event in events)))


def played(events, request, *, broken=False):
    stamper = stream_stamper(request, PRIORITY)
    wire = fed(stamper, *events)
    if broken:
        wire += stamper.break_off()
    got = [event.data for event in events_of(wire)]
    return stamper, [data if data == b"[DONE]" else json.loads(data) for data in got]


def test_who_did_not_ask_for_usage_gets_no_chunk_more_and_usage_on_the_last_one():
    stamper, got = played(STREAM, inbound(stream=True))
    assert [c["choices"][0]["delta"]["content"] for c in got[:-1]] == ["a", "b", ""]
    assert [("usage" in c) for c in got[:-1]] == [False, False, True]
    assert got[2]["usage"]["estimated_cost"] == pytest.approx(1.5 * (3 * 0.02 + 2 * 0.04) / 1e6)
    assert got[-1] == b"[DONE]"
    assert stamper.counted().usage == TokenUsage(3, 0, 2)
    assert stamper.ended


def test_who_asked_for_usage_gets_it_with_its_cost_on_the_last_chunk():
    request = inbound(stream=True, stream_options={"include_usage": True})
    _, got = played(STREAM, request)
    assert [c["usage"] is None for c in got[:-1]] == [True, True, True, False]
    assert got[3]["choices"] == []
    assert got[3]["usage"]["estimated_cost"] > 0


def test_a_stream_has_one_id_whatever_the_engine_gives_each_choice():
    def of(name, index):
        return Event(json.dumps({**json.loads(chunk("a", index=index).data), "id": name}).encode())

    _, got = played([of("x", 0), of("y", 1), of("x", 0), DONE], inbound(stream=True))
    assert [c["id"] for c in got[:-1]] == ["x", "x", "x"]


def test_who_asked_for_continuous_usage_gets_it_on_every_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, got = played(STREAM, inbound(stream=True, stream_options=options))
    assert [c["usage"]["completion_tokens"] for c in got[:-1]] == [1, 2, 2, 2]
    assert all("estimated_cost" in c["usage"] for c in got[:-1])


@given(st.booleans(), st.integers(1, 3), st.integers(0, 8))
def test_every_chunk_carries_the_tier_wherever_the_stream_stops(wants_usage, answers, length):
    events = [chunk("x", usage=i + 1, index=i % answers) for i in range(length)]
    events += [chunk("", "stop", usage=length, index=i) for i in range(answers)]
    options = {"include_usage": True} if wants_usage else None
    for stop in range(len(events) + 1):
        _, got = played(events[:stop], inbound(stream=True, stream_options=options), broken=True)
        assert got[-1]["error"]["type"] == "server_error"
        assert len(got) == stop + 1, "no chunk is lost, none is added"
        assert all(c["service_tier"] == "priority" for c in got[:-1])


def test_an_engines_error_in_mid_stream_ends_it_in_openais_shape():
    error = Event(b'{"error": {"message": "at /opt/x/y.py", "code": 500}}')
    stamper, got = played([chunk("a"), error], inbound(stream=True))
    assert got[-1]["error"]["message"] == "The server had an error while processing your request."
    assert stamper.ended


@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS, Route.RESPONSES])
@pytest.mark.parametrize("after", [[DONE], [chunk("b")], [chunk("b"), DONE], [DONE, DONE]])
def test_nothing_follows_an_engines_error_in_the_same_read(route, after):
    error = Event(b'{"type": "error", "error": {"message": "broken", "code": 500}}')
    stamper, got = played([error, *after], inbound(route, stream=True))
    assert len(got) == 1 and stamper.failed
    assert fed(stamper, *after) == b""


COMMENTS = [b": keep-alive", b":", b": two\n: lines", b': {"choices": []}']
RESPONSES = [
    Event(json.dumps({"type": "response.created", "response": {"id": "r"}}).encode()),
    Event(b'{"type": "response.output_text.delta", "delta": "a"}', b"response.output_text.delta"),
    Event(json.dumps({"type": "response.completed", "response": {"id": "r"}}).encode()),
]


@given(
    st.sampled_from([(Route.CHAT, STREAM), (Route.RESPONSES, RESPONSES)]),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(COMMENTS)), max_size=8),
    st.booleans(),
)
def test_comments_pass_and_change_no_event(answer, placed, together):
    route, events = answer
    blocks = [event.encode().removesuffix(b"\n\n") for event in events]
    for place, comment in sorted(placed, key=lambda one: one[0], reverse=True):
        blocks.insert(place, comment)
    request = inbound(route, stream=True)
    plain, commented = stream_stamper(request, PRIORITY), stream_stamper(request, PRIORITY)
    expected = fed(plain, *events)
    reads = [blocks] if together else [[block] for block in blocks]
    wire = b"".join(commented.feed(read) for read in reads)
    assert events_of(wire) == events_of(expected)
    assert commented.counted() == plain.counted() and commented.ended
    passed = [line for line in wire.split(b"\n") if line.startswith(b":")]
    sent = b"\n".join(block for block in blocks if block.startswith(b":"))
    assert passed == (sent.split(b"\n") if sent else [])


def test_a_comment_in_the_lines_of_an_event_passes_before_it():
    stamper = stream_stamper(inbound(stream=True), PRIORITY)
    [block] = EventReader().blocks(b": one\n" + chunk("a").encode())
    wire = stamper.feed([block])
    assert wire.startswith(b": one\n\ndata: ")
    [event] = events_of(wire)
    assert json.loads(event.data)["choices"][0]["delta"]["content"] == "a"


def test_responses_events_are_stamped_where_they_carry_the_response():
    def event(kind, **fields):
        return Event(json.dumps({"type": kind, **fields}).encode(), kind.encode())

    usage = {"input_tokens": 3, "output_tokens": 2}
    events = [
        event("response.created", response={"service_tier": "auto"}, sequence_number=0),
        event("response.output_text.delta", delta="a", sequence_number=1),
        event("response.completed", response={"usage": usage}, sequence_number=2),
    ]
    request = inbound(Route.RESPONSES, stream=True)
    stamper, got = played(events, request)
    assert got[0]["response"]["service_tier"] == "priority"
    assert got[1] == {"type": "response.output_text.delta", "delta": "a", "sequence_number": 1}
    assert got[2]["response"]["usage"]["estimated_cost"] > 0
    assert stamper.ended and stamper.counted().usage == TokenUsage(3, 0, 2)

    _, got = played(events[:2], request, broken=True)
    assert (got[-1]["type"], got[-1]["sequence_number"]) == ("error", 2)


# Words that an unwary splicer would take for a chunk's own.
WORDS = [
    "usage",
    "error",
    "finish_reason",
    "service_tier",
    ',"usage":{"a":1}}',
    "}",
    "\\",
    '"',
    "x",
]
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=4).map("".join)
counts = st.fixed_dictionaries(
    {"prompt_tokens": st.integers(0, 9), "completion_tokens": st.integers(0, 99)},
    optional={"prompt_tokens_details": st.sampled_from([None, {"cached_tokens": 0}])},
)
odd = st.sampled_from([{}, {"usage": None}, {"error": None}, {"usage": {"a": "}"}}, [{"usage": 1}]])
choices = st.lists(
    st.fixed_dictionaries(
        {"index": st.integers(0, 1), "delta": st.fixed_dictionaries({"content": texts})},
        optional={"finish_reason": st.sampled_from([None, None, "stop"]), "logprobs": odd},
    ),
    max_size=2,
)
plain = st.builds(
    lambda text, number: {
        "id": "x",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        "usage": {"prompt_tokens": 9, "completion_tokens": number},
    },
    texts,
    st.integers(0, 999),
)
chunks = plain | st.fixed_dictionaries(
    {"id": st.sampled_from(["x", "x", "y"]), "choices": choices},
    optional={"usage": st.none() | counts, "extra": odd, "service_tier": st.none()},
)


def wired(chunk, compact, order):
    fields = dict(sorted(chunk.items(), key=lambda item: order(item[0])))
    separators = (",", ":") if compact else None
    return Event(json.dumps(fields, separators=separators, ensure_ascii=False).encode())


def unlike(event, number):
    """The same for a parser; no splicer finds it like one with another number."""
    return Event(b" " * number + event.data)


@given(
    st.lists(st.tuples(chunks, st.booleans()), max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from([None, {"include_usage": True}]),
)
def test_splicing_a_chunk_comes_to_the_same_as_parsing_it(sent, random, options):
    shuffled = random.choice([lambda _: 0, lambda _: random.random()])
    events = [wired(chunk, compact, shuffled) for chunk, compact in sent]
    request = inbound(stream=True, stream_options=options)
    spliced, parsed = ChunkStamper(request, PRIORITY), ChunkStamper(request, PRIORITY)
    for number, event in enumerate(events):
        got, expected = (
            [json.loads(e.data) for e in events_of(wire)]
            for wire in (fed(spliced, event), fed(parsed, unlike(event, number)))
        )
        assert got == expected
        same_count(spliced.counted(), parsed.counted())
    assert (spliced.ended, spliced.failed) == (parsed.ended, parsed.failed)


def same_count(spliced, parsed):
    """Compare what is billed: estimates of spliced chunks count escaped text as it came."""
    assert spliced.estimated == parsed.estimated
    if spliced.estimated:
        assert spliced.usage.prompt_tokens == parsed.usage.prompt_tokens
        assert spliced.usage.completion_tokens >= parsed.usage.completion_tokens
    else:
        assert spliced.usage == parsed.usage


near = st.builds(
    lambda text, usage, extra: {
        "id": "x",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        "usage": usage,
        **extra,
    },
    st.sampled_from(["a", "b", 'a"}', "\\", 'a"},"finish_reason":null}],"usage":']),
    counts | st.sampled_from([None, {"completion_tokens": 3, "prompt_tokens": 2}]),
    st.sampled_from([{}, {}, {"error": None}, {"service_tier": "x"}]),
)


@given(st.lists(near, min_size=3, max_size=12))
def test_chunks_that_are_nearly_alike_are_told_apart(sent):
    request = inbound(stream=True)
    spliced, parsed = ChunkStamper(request, PRIORITY), ChunkStamper(request, PRIORITY)
    for number, fields in enumerate(sent):
        event = Event(json.dumps(fields, separators=(",", ":")).encode())
        expected = fed(parsed, unlike(event, number))
        assert json.loads(fed(spliced, event)[6:]) == json.loads(expected[6:])
        same_count(spliced.counted(), parsed.counted())


def same_together(sent, options):
    """Compare what comes of events that arrive together, after one, spliced and parsed."""
    request = inbound(stream=True, stream_options=options)
    spliced, parsed = ChunkStamper(request, PRIORITY), ChunkStamper(request, PRIORITY)
    others = [unlike(event, number) for number, event in enumerate(sent)]
    for together, apart in ((sent[:1], others[:1]), (sent[1:], others[1:])):
        got, expected = (
            [json.loads(e.data) for e in events_of(wire)]
            for wire in (fed(spliced, *together), fed(parsed, *apart))
        )
        assert got == expected
        same_count(spliced.counted(), parsed.counted())


@given(
    st.lists(chunks, min_size=2, max_size=8),
    st.booleans(),
    st.sampled_from([None, {"include_usage": True}]),
)
def test_splicing_chunks_that_come_together_comes_to_the_same(sent, compact, options):
    same_together([wired(chunk, compact, lambda _: 0) for chunk in sent], options)


@given(
    st.lists(near, min_size=1, max_size=3),
    st.lists(st.tuples(texts, st.sampled_from("xxxxxxxy"), st.integers(0, 99)), min_size=10),
    st.booleans(),
    st.data(),
)
def test_nearly_alike_chunks_that_come_together_are_told_apart(kinds, said, compact, data):
    """Most have the first one's kind: then those that are alike are stamped with one another."""
    events = []
    for text, name, number in said:
        fields = data.draw(st.sampled_from(kinds)) | {"id": name}
        usage = fields["usage"] and fields["usage"] | {"completion_tokens": number}
        choice = fields["choices"][0] | {"delta": {"content": text}}
        events.append(wired(fields | {"choices": [choice], "usage": usage}, compact, lambda _: 0))
    same_together(events, None)


def test_choices_that_take_turns_are_not_gone_through_again_for_each():
    def event(index):
        choice = {"index": index, "delta": {"content": "a"}, "finish_reason": None}
        fields = {"id": "x", "choices": [choice]}
        return Event(json.dumps(fields, separators=(",", ":")).encode())

    stamper = stream_stamper(inbound(stream=True), PRIORITY)
    fed(stamper, event(0), event(1))
    began = time.process_time()
    wire = fed(stamper, *(event(number % 2) for number in range(6000)))
    assert wire.count(b'"service_tier":"priority"') == 6000
    # Some 30 ms; all that is left, again for each, would be seconds.
    assert time.process_time() - began < 1


def test_a_chunk_that_is_no_json_is_found_among_others():
    def event(text):
        choice = b'{"index":0,"delta":{"content":"%b"},"finish_reason":null}' % text
        return Event(b'{"id":"x","choices":[%b]}' % choice)

    stamper = stream_stamper(inbound(stream=True), PRIORITY)
    fed(stamper, event(b"a"))
    wire = fed(stamper, *(event(text) for text in (b"a", b"b", b"a\\", b"c", b"d")))
    assert stamper.broken and wire.count(b"data: ") == 2, "what came before it is passed on"
    assert fed(stamper, event(b"e")) == b""


def test_ordinary_chunks_are_not_parsed(monkeypatch):
    """What makes streaming cheap: of a hundred chunks three are parsed."""

    def event(content, finish, generated):
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
        usage = {"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": generated}
        fields = {"id": "x", "choices": [choice], "usage": usage}
        return Event(json.dumps(fields, separators=(",", ":")).encode())

    stamper = stream_stamper(inbound(stream=True), PRIORITY)
    parsed = []
    loads = orjson.loads
    monkeypatch.setattr("app.protocol.stream.orjson.loads", lambda d: parsed.append(d) or loads(d))
    events = [event("a", None, number) for number in range(99)] + [event("", "stop", 99)]
    wire = fed(stamper, *events)
    # The first one, which is the template of the others, the proof of that, and the last one.
    assert len([data for data in parsed if b'"usage"' in data]) <= 3
    assert wire.count(b'"service_tier":"priority"') == 99, "the last one waits for the usage"
    assert stamper.counted().usage == TokenUsage(3, 0, 99)


def test_chunks_that_begin_like_another_kind_are_not_gone_through_again_for_each():
    def event(**more):
        choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": None, **more}
        fields = {"id": "x", "choices": [choice]}
        return Event(json.dumps(fields, separators=(",", ":")).encode())

    stamper = stream_stamper(inbound(stream=True), PRIORITY)
    fed(stamper, event())
    fed(stamper, event(logprobs=None))
    began = time.process_time()
    wire = fed(stamper, *(event() for _ in range(12_000)))
    assert wire.count(b'"service_tier":"priority"') == 12_000
    # Some 60 ms; all that is left, again for each, would be seconds.
    assert time.process_time() - began < 1
