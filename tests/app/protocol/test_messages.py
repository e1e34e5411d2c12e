import json
from decimal import Decimal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.core.errors import EngineBusy, EngineRejected, RateLimited, ServerError, Unavailable
from app.core.pricing import RateCard, TokenUsage, cost
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.protocol import anthropic
from app.protocol.messages import MessagesStamper
from app.protocol.requests import is_preamble, parse_request, stream_error
from app.protocol.sse import Event, EventReader, parse_block
from app.protocol.stream import stamp_answer

pytestmark = pytest.mark.unit

CARD = RateCard.load({"input": 3, "cached_input": 1, "output": 7}, "card")
ASK = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi " * 50}]})
INBOUND = parse_request(Route.MESSAGES, ASK)

counts = st.integers(0, 10**6)
tiers = st.sampled_from(Tier)
impossible = st.one_of(
    st.none(), st.integers(-9, -1), st.just(2**70), st.text(max_size=3), st.booleans(), st.just([]),
    st.floats(allow_nan=False, allow_infinity=False),  # those are no JSON
)  # fmt: skip


def decided(tier):
    return TierDecision(tier, tier, None, CARD)


def events(wire):
    blocks = EventReader().blocks(wire)
    return [json.loads(event.data) for block in blocks if (event := parse_block(block))]


def block(kind, **fields):
    # Not orjson, which writes no integer of more than 64 bits; engines may.
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}".encode()


def stream(start, end, texts):
    return [
        block("message_start", message={"id": "x", "usage": start}),
        block("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(
            block("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
            for text in texts
        ),
        block("content_block_stop", index=0),
        block("message_delta", delta={"stop_reason": "end_turn"}, usage=end),
        block("message_stop"),
    ]


@given(counts, counts, st.integers(1, 10**6), tiers, st.booleans())
def test_the_tokens_of_an_answer_are_billed_and_its_tier_and_cost_told(
    fresh, cached, output, tier, tells
):
    usage = {"input_tokens": fresh, "output_tokens": output}
    usage |= {"cache_read_input_tokens": cached} if tells else {}
    body = orjson.dumps({"content": [{"type": "text", "text": "x"}], "usage": usage})
    told, counted = stamp_answer(body, INBOUND, decided(tier))
    billed = TokenUsage(fresh + cached * tells, cached * tells, output)
    assert counted == (billed, False)
    shown = json.loads(told, parse_float=Decimal)["usage"]
    assert shown.pop("estimated_cost") == cost(billed, CARD, tier)
    assert shown == usage | {"service_tier": tier.value}


@given(st.integers(1, 10**6), counts, st.integers(1, 10**6), tiers, st.booleans(), st.data())
def test_of_a_stream_too_however_the_engine_tells_it(fresh, cached, output, tier, again, draw):
    read = {"cache_read_input_tokens": cached}
    start = {"input_tokens": fresh, "output_tokens": 0} | read
    end = {"output_tokens": output}
    if again:
        # As vLLM: what was cached is known only at the end.
        start, end = {"input_tokens": fresh + cached, "output_tokens": 0}, end | start | end
    blocks = stream(start, end, ["a", "b"])
    stamper, wire = MessagesStamper(INBOUND, decided(tier)), b""
    while blocks:
        many = draw.draw(st.integers(1, len(blocks)))
        wire, blocks = wire + stamper.feed(blocks[:many]), blocks[many:]
    billed = TokenUsage(fresh + cached, cached, output)
    assert stamper.counted() == (billed, False)
    assert stamper.ended and not stamper.odd_usage
    told = events(wire)
    assert told[0]["message"]["usage"]["service_tier"] == tier.value
    assert "estimated_cost" not in told[0]["message"]["usage"]
    shown = told[-2]["usage"]
    assert shown["service_tier"] == tier.value
    assert Decimal(str(shown["estimated_cost"])) == pytest.approx(cost(billed, CARD, tier))
    assert told[1:-2] == events(b"".join(one + b"\n\n" for one in stream({}, {}, ["a", "b"])))[1:-2]


@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=9),
    st.integers(1, 10**6),
    st.sampled_from(["lost", "error", "stop"]),
    tiers,
)
def test_what_was_sent_is_billed_and_told_where_the_end_is_missing(texts, prompt, end, tier):
    stamper = MessagesStamper(INBOUND, decided(tier))
    start = {"input_tokens": prompt, "output_tokens": 1}
    stamper.feed(stream(start, {}, texts)[: 2 + len(texts)])
    usage, estimated = stamper.counted()
    assert usage.prompt_tokens == prompt and estimated
    assert len(texts) <= usage.completion_tokens <= len("".join(texts).encode()) + len(texts)
    assert not stamper.odd_usage and not stamper.ended
    if end == "lost":
        wire = stamper.break_off()
    elif end == "error":
        wire = stamper.feed([block("error", error={"type": "api_error", "message": "x"})])
    else:
        wire = stamper.feed([block("message_stop")])
        assert stamper.odd_usage
    told, last = events(wire)
    assert (told["type"], told["delta"]["stop_reason"]) == ("message_delta", None)
    shown = told["usage"]
    assert (shown["input_tokens"], shown["output_tokens"]) == (prompt, usage.completion_tokens)
    assert shown["usage_estimated"] is True and shown["service_tier"] == tier.value
    assert Decimal(str(shown["estimated_cost"])) == pytest.approx(cost(usage, CARD, tier))
    if end == "stop":
        assert last == {"type": "message_stop"}
    else:
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")


def test_a_stream_that_breaks_off_before_it_has_begun_tells_only_the_error():
    [error] = events(MessagesStamper(INBOUND, decided(Tier.DEFAULT)).break_off())
    assert error["type"] == "error"


@given(impossible, st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens"]))
def test_impossible_usage_is_estimated_and_said_so(value, name):
    usage = {"input_tokens": 5, "output_tokens": 6} | {name: value}
    if value is None and name != "output_tokens":
        # Not told at the end: what was told at the beginning counts.
        return
    stamper = MessagesStamper(INBOUND, decided(Tier.DEFAULT))
    wire = stamper.feed(stream({"input_tokens": 5, "output_tokens": 0}, usage, ["a"] * 4))
    counted, estimated = stamper.counted()
    shown = events(wire)[-2]["usage"]
    assert estimated and shown["usage_estimated"] is True and stamper.odd_usage
    assert shown["output_tokens"] == counted.completion_tokens > 0
    assert shown["input_tokens"] + shown["cache_read_input_tokens"] == counted.prompt_tokens > 0


def test_an_engine_that_knows_no_prompt_at_first_and_none_at_last_is_not_free():
    stamper = MessagesStamper(INBOUND, decided(Tier.DEFAULT))
    stamper.feed(stream({"input_tokens": 0, "output_tokens": 0}, {"output_tokens": 4}, ["a"] * 4))
    counted, estimated = stamper.counted()
    assert counted.prompt_tokens == INBOUND.expected_prompt_tokens > 0
    assert (counted.completion_tokens, estimated) == (4, True)


def test_an_error_of_the_engine_ends_the_stream_and_shows_nothing_of_it():
    stamper = MessagesStamper(INBOUND, decided(Tier.DEFAULT))
    blocks = stream({"input_tokens": 5, "output_tokens": 0}, {}, ["a"])[:3]
    error = {"type": "api_error", "message": "CUDA at /opt/x.py line 3"}
    wire = stamper.feed([*blocks, block("error", error=error), block("message_stop")])
    assert stamper.ended and stamper.failed
    assert events(wire)[-1]["type"] == "error" and b"/opt" not in wire


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineRejected(400, "x", None, None), "invalid_request_error"),
        (EngineRejected(422, "x", None, None), "invalid_request_error"),
        (RateLimited("requests", 1, 1), "rate_limit_error"),
        (EngineBusy(503), "overloaded_error"),
        (Unavailable("x", "y", 1), "overloaded_error"),
        (ServerError(), "api_error"),
    ],
)
def test_the_types_of_errors(error, kind):
    told = json.loads(anthropic.error_body(error))
    assert (told["type"], told["error"]["type"]) == ("error", kind)
    assert told["error"]["message"] == error.message


def test_a_stream_that_is_refused_after_its_first_event_has_the_errors_status():
    start = Event(b'{"type":"message_start","message":{}}', b"message_start")
    assert is_preamble(start, Route.MESSAGES) and not is_preamble(start, Route.CHAT)
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "full"}}
    found = stream_error(Event(orjson.dumps(error), b"error"), Route.MESSAGES)
    assert found is not None and found.status == 503
