import json
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Dialect, Route
from app.core.errors import InvalidRequest
from app.core.pricing import RateCard
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier
from app.protocol.requests import (
    FRONTLINE_FIELDS,
    json_number,
    parse_request,
    rewrite_request,
    stamp,
    stream_error,
    with_start_within,
)
from app.protocol.sse import Event

pytestmark = pytest.mark.unit

CARD = RateCard(input="0.02", cached_input="0.01", output="0.04")
PRIORITY = TierDecision(Tier.PRIORITY, Tier.PRIORITY, None, CARD)
NATIVE = Dialect(
    engine="vllm",
    priority_values={Tier.PRIORITY: -100, Tier.DEFAULT: 0, Tier.FLEX: 100},
    priority_routes=frozenset(Route),
    stream_options={"include_usage": True, "continuous_usage_stats": True},
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def inbound(route=Route.CHAT, /, **fields):
    return parse_request(route, json.dumps({"model": "m", **fields}).encode())


def rewritten(request, dialect=NATIVE, tier=Tier.PRIORITY):
    return json.loads(rewrite_request(request, "org/m", dialect, tier))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b"{}", "model"),
        (b'{"model": 3}', "model"),
        (b'{"model": ""}', "model"),
        (b'{"model": "m", "service_tier": "gold"}', "service_tier"),
        (b'{"model": "m", "service_tier": 1}', "service_tier"),
        (b'{"model": "m", "stream": "yes"}', "stream"),
        (b'{"model": "m", "stream_options": []}', "stream_options"),
    ],
)
def test_bad_requests_name_the_field(body, param):
    with pytest.raises(InvalidRequest) as caught:
        parse_request(Route.CHAT, body)
    assert caught.value.param == param
    assert caught.value.status == 400


READ = {"stream", "stream_options", "fail_fast", "start_within", "start_within_tier"}


@given(st.dictionaries(st.text().filter(lambda key: key not in READ), json_values))
def test_everything_else_but_null_passes_through_untouched(fields):
    fields = {**fields, "model": "m", "service_tier": "priority"}
    sent = rewritten(inbound(**fields), Dialect("plain"))
    kept = {k: v for k, v in fields.items() if k not in FRONTLINE_FIELDS and v is not None}
    assert sent == {**kept, "model": "org/m"}


@given(st.sampled_from(Tier), json_values)
def test_a_clients_own_priority_never_reaches_the_engine(tier, priority):
    request = inbound(priority=priority, fail_fast=True, service_tier=tier.value)
    assert rewritten(request, NATIVE, tier)["priority"] == NATIVE.priority_values[tier]
    assert FRONTLINE_FIELDS.isdisjoint(rewritten(request, Dialect("plain"), tier))


@pytest.mark.parametrize("more", [{}, {"start_within": None, "start_within_tier": None}])
def test_without_a_deadline_there_is_none(more):
    request = inbound(**more)
    assert (request.start_within_s, request.start_within_tier) == (None, Tier.DEFAULT)


def test_a_deadline_is_read_and_never_reaches_the_engine():
    request = inbound(start_within="1m30s", start_within_tier="priority", kept=1)
    assert (request.start_within_s, request.start_within_tier) == (90, Tier.PRIORITY)
    assert rewritten(request, Dialect("plain")) == {"model": "org/m", "kept": 1}


def test_the_header_stands_for_a_field_that_is_absent():
    assert with_start_within(inbound(), b"2.5").start_within_s == 2.5
    assert with_start_within(inbound(), b"00h-00m-30s").start_within_s == 30
    assert with_start_within(inbound(start_within=1), b"nonsense").start_within_s == 1
    assert with_start_within(inbound(), None).start_within_s is None
    with pytest.raises(InvalidRequest) as caught:
        with_start_within(inbound(), "\u00b5".encode("latin-1"))
    assert caught.value.param == "x-start-within"


def test_a_deadline_is_also_read_in_a_long_body_unless_it_is_long_itself():
    long = "x" * 600_000
    assert inbound(messages=long, start_within="30s").start_within_s == 30
    for name in ("start_within", "start_within_tier"):
        with pytest.raises(InvalidRequest) as caught:
            inbound(messages=long, **{name: "1" * 40_000})
        assert caught.value.param == name


def test_no_priority_is_sent_on_a_route_that_does_not_honour_it():
    chat_only = Dialect(
        "x", priority_values=NATIVE.priority_values, priority_routes=frozenset({Route.CHAT})
    )
    assert "priority" in rewritten(inbound(), chat_only)
    assert "priority" not in rewritten(inbound(Route.RESPONSES), chat_only)


def test_a_strict_engine_gets_only_the_fields_that_it_accepts():
    strict = Dialect("x", accepted_fields={Route.CHAT: frozenset({"model", "messages"})})
    request = inbound(messages=[], mystery=1, stream=True)
    assert rewritten(request, strict) == {"model": "org/m", "messages": []}


def test_a_strict_engine_gets_only_our_stream_options():
    names = frozenset({"model", "stream", "stream_options"})
    strict = Dialect(
        "x", stream_options={"include_usage": True}, accepted_fields={Route.CHAT: names}
    )
    request = inbound(stream=True, stream_options={"include_obfuscation": False})
    assert rewritten(request, strict) == {
        "model": "org/m",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_null_stands_for_absent():
    assert rewritten(inbound(n=None, stop=None, user="x")) == rewritten(inbound(user="x"))


def test_a_stream_is_always_asked_for_its_usage():
    options = {"include_usage": False, "other": 1}
    sent = rewritten(inbound(stream=True, stream_options=options))
    assert sent["stream_options"] == {**options, **NATIVE.stream_options}
    assert "stream_options" not in rewritten(inbound())
    assert "stream_options" not in rewritten(inbound(Route.RESPONSES, stream=True))


@given(st.decimals(0, 1000, places=14))
def test_an_amount_keeps_every_digit_and_has_no_exponent(amount):
    text = orjson.dumps(json_number(amount)).decode()
    assert Decimal(text) == amount
    assert "E" not in text.upper()


def test_an_answer_is_stamped_with_the_decision():
    answer: dict[str, Any] = {
        "service_tier": None,
        "usage": {"prompt_tokens": 1000, "completion_tokens": 250},
    }
    stamp(answer, PRIORITY)
    assert answer["service_tier"] == "priority"
    assert orjson.dumps(answer["usage"]["estimated_cost"]) == b"0.000045"


def chunk(content):
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return Event(json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode())


def test_an_error_as_first_event_is_found_and_ordinary_text_is_not():
    first = stream_error(Event(b'{"error": {"message": "queue full", "code": 503}}'), Route.CHAT)
    assert first and first.status == 503
    refused = stream_error(Event(b'{"error": {"message": "bad", "code": 400}}'), Route.CHAT)
    assert refused and refused.status == 400
    assert stream_error(chunk('say "error"'), Route.CHAT) is None
    assert stream_error(Event(b'{"error": null, "choices": []}'), Route.CHAT) is None


@given(json_values)
def test_no_response_is_made_in_the_background(value):
    harmless = value is None or value is False or (value == 0 and not isinstance(value, bool))
    if harmless:
        inbound(Route.RESPONSES, background=value)
        return
    with pytest.raises(InvalidRequest) as caught:
        inbound(Route.RESPONSES, background=value)
    assert caught.value.param == "background"


def test_other_routes_know_no_background():
    assert inbound(Route.CHAT, background=True).fields["background"] is True
