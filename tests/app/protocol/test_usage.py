import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import AUDIO_ROUTES, Route
from app.core.pricing import TokenUsage
from app.protocol.anthropic import plain_usage
from app.protocol.usage import (
    MOST_TOKENS,
    Count,
    Counted,
    count_answer,
    read_usage,
    recording_used,
    text_size,
    told_seconds,
    usage_fields,
)

pytestmark = pytest.mark.unit

PROMPT = 11
tokens = st.integers(0, 1000)
impossible = st.one_of(
    st.integers(max_value=-1), st.integers(min_value=MOST_TOKENS + 1), st.floats(),
    st.text(min_size=1), st.just(True), st.lists(st.none(), min_size=1),
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens",
             "prompt_tokens_details", "cached_tokens", "content", "index", "usage"]
        ),
        inner,
    ),
    max_leaves=12,
)  # fmt: skip


def sane(prompt, completion, cached=None):
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, **details}


def new(choices_per_prompt=1):
    return Count(PROMPT, choices_per_prompt)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        ({}, None),
        ({"prompt_tokens": 5, "completion_tokens": 2}, TokenUsage(5, 0, 2)),
        ({"prompt_tokens": 5, "total_tokens": 5}, TokenUsage(5, 0, 0)),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": None,
                "prompt_tokens_details": {"cached_tokens": 3},
            },
            TokenUsage(5, 3, 0),
        ),
        (
            {
                "input_tokens": 7,
                "output_tokens": 1,
                "input_tokens_details": {"cached_tokens": 9},
            },
            TokenUsage(7, 7, 1),
        ),
        ({"prompt_tokens": 5, "prompt_tokens_details": None}, TokenUsage(5, 0, 0)),
        ({"prompt_tokens": True, "completion_tokens": 1}, None),
        ({"prompt_tokens": 5, "completion_tokens": -1}, None),
    ],
)
def test_usage_of_every_route_is_read(usage, expected):
    assert read_usage(usage) == expected


@given(st.lists(st.tuples(anything, st.none() | st.integers(0, 3)), max_size=6), tokens, tokens)
def test_whatever_an_engine_tells_there_is_a_count_that_can_be(told, deltas, size):
    count = new()
    for usage, choice in told:
        count.told(usage, choice)
    count.sent(deltas, size)
    counted = count.result()
    assert counted.usage.completion_tokens >= 0
    if deltas:
        assert counted.usage.completion_tokens > 0, "text that was sent is never free"


@pytest.mark.parametrize("name", ["cache_write_tokens", "created_cache_tokens"])
@given(prompt=tokens, cached=tokens | impossible, written=tokens | impossible)
def test_cache_writes_are_read_under_each_name_and_never_overlap_with_reads(
    name, prompt, cached, written
):
    usage = sane(prompt, 1)
    usage["prompt_tokens_details"] = {"cached_tokens": cached, name: written}
    count = Count(PROMPT, images=2)
    possible = type(cached) is type(written) is int and min(cached, written) >= 0
    possible = possible and cached + written <= prompt
    assert count.told(usage) is possible
    counted = count.result()
    assert counted.estimated is not possible and counted.usage.images == 2
    if possible:
        assert counted.usage == TokenUsage(prompt, cached, 1, written, 2)
        assert read_usage(usage, 2) == counted.usage
    used = counted.usage
    assert used.cached_tokens + used.cache_write_tokens <= used.prompt_tokens == prompt


def test_anthropics_cache_writes_are_a_part_of_the_prompt():
    usage = {"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 4,
             "output_tokens": 2}  # fmt: skip
    assert read_usage(plain_usage(usage)) == TokenUsage(12, 3, 2, 4)
    told = usage_fields(Counted(TokenUsage(12, 3, 2, 4)), Route.MESSAGES)
    assert told == usage


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ({"usage": {"type": "duration", "seconds": 3}}, 3),
        ({"usage": {"type": "duration", "seconds": 2.1}, "duration": 9.0}, 3),
        ({"duration": 2.0}, 2),
        ({"usage": {"seconds": 0}, "duration": 1.5}, 2),
        ({"usage": {"seconds": True}}, None),
        ({"usage": {"seconds": "3"}, "duration": "3"}, None),
        ({"usage": {"seconds": -1}, "duration": float("nan")}, None),
        ({"duration": float("inf")}, None),
        ({"duration": MOST_TOKENS + 1}, None),
        ({"usage": [], "duration": None}, None),
        ({}, None),
    ],
)
def test_seconds_of_a_recording_are_told_in_usage_or_as_its_duration(answer, seconds):
    assert told_seconds(answer) == seconds


@given(tokens, st.integers(1, 1000), st.integers(0, 1000))
def test_what_can_be_is_billed_as_it_was_told(prompt, completion, cached):
    cached = min(cached, prompt)
    count = new()
    count.sent(3, 5000)
    assert count.told(sane(prompt, completion, cached))
    assert count.result() == Counted(TokenUsage(prompt, cached, completion))
    assert not count.odd


@given(impossible, impossible, tokens)
def test_what_cannot_be_is_estimated_field_by_field(bad, worse, good):
    count = new()
    count.sent(2, 8)
    assert not count.told(sane(good, bad))
    assert count.result() == Counted(TokenUsage(good, 0, 2), estimated=True)
    assert not count.told(sane(bad, good + 1))
    assert count.result() == Counted(TokenUsage(PROMPT, 0, good + 1), estimated=True)
    assert not count.told(sane(good, good + 1, worse))
    assert count.result().usage.prompt_tokens == good and count.result().estimated
    assert count.odd


@given(st.lists(st.integers(1, 99), min_size=1, max_size=6), st.integers(1, 3))
def test_choices_are_added_up_and_each_prompt_counts_once(completions, per_prompt):
    count = new(per_prompt)
    for choice, completion in enumerate(completions):
        count.told(sane(7, 1), choice)
        count.told(sane(7, completion), choice)
    prompts = -(-len(completions) // per_prompt)
    assert count.result() == Counted(TokenUsage(7 * prompts, 0, sum(completions)))
    # The whole answer's usage takes their place, unless it tells less than they do.
    count.told(sane(9, sum(completions) + 2))
    assert count.result() == Counted(TokenUsage(9, 0, sum(completions) + 2))
    count.told(sane(9, sum(completions) - 1))
    assert count.result().usage.completion_tokens == sum(completions)
    assert count.result().estimated


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 60)), max_size=20))
def test_an_estimate_never_falls(sent):
    count, before = new(), 0
    for deltas, size in sent:
        count.sent(deltas, size)
        now = count.result().usage.completion_tokens
        assert now >= before
        before = now
    assert before >= sum(deltas for deltas, _ in sent)


def test_deltas_that_hold_several_tokens_are_counted_by_their_bytes():
    count = new()
    count.sent(2, 400)
    assert count.result() == Counted(TokenUsage(PROMPT, 0, 80), estimated=True)


@given(anything)
def test_a_whole_answer_of_any_shape_is_counted(usage):
    for answer in (
        {"choices": [{"message": {"role": "assistant", "content": "four" * 10}}]},
        {"choices": [{"text": "four" * 10}]},
        {"output": [{"type": "message", "content": [{"type": "t", "text": "four" * 10}]}]},
    ):
        counted = count_answer({**answer, "usage": usage}, Route.CHAT, PROMPT)
        read = read_usage(usage)
        if read is None or not read.completion_tokens:
            assert counted.estimated and counted.usage.completion_tokens >= 8
        else:
            assert counted.usage == read
            as_a_stream = Count(PROMPT)
            as_a_stream.told(usage)
            assert counted == as_a_stream.result()


def test_an_answer_without_usage_is_estimated_and_an_embedding_has_no_completion():
    counted = count_answer({"data": [], "usage": None}, Route.EMBEDDINGS, PROMPT)
    assert counted == Counted(TokenUsage(PROMPT, 0, 0), estimated=True)


@given(anything)
def test_text_of_any_shape_has_a_size(value):
    assert text_size(value) >= 0


@pytest.mark.parametrize("route", Route)
def test_estimated_usage_is_told_in_the_routes_own_words(route):
    fields = usage_fields(Counted(TokenUsage(5, 2, 3), estimated=True), route)
    plain = plain_usage(fields) if route.is_anthropic else fields
    if route in AUDIO_ROUTES:
        fields = usage_fields(recording_used(7, estimated=True), route)
        assert fields == {"type": "duration", "seconds": 7, "usage_estimated": True}
        assert read_usage(fields) == TokenUsage(0, 0, 0, audio_seconds=7)
        return
    assert read_usage(plain) == TokenUsage(5, 2, 3)
    assert ("input_tokens" in fields) is (route is Route.RESPONSES or route.is_anthropic)
    assert fields["usage_estimated"] is True
    assert "usage_estimated" not in usage_fields(Counted(TokenUsage(5, 2, 3)), route)
