from json import dumps as json_text

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.protocol.json_body.raw import RawJson
from app.protocol.requests import parse_request
from app.protocol.token_estimate import IMAGE_TOKENS, estimate_tokens, sequences

pytestmark = pytest.mark.unit


def expected_tokens(route, fields, length):
    return estimate_tokens(route, fields, length).total


def expected(route, **fields):
    return parse_request(route, orjson.dumps({"model": "m", **fields})).expected_tokens


@pytest.mark.parametrize(
    ("route", "fields", "least"),
    [
        (Route.CHAT, {"max_completion_tokens": 5, "max_tokens": 4000}, 4000),
        (Route.CHAT, {"max_completion_tokens": 4000}, 4000),
        (Route.CHAT, {"max_tokens": 1000, "n": 4}, 4000),
        (Route.CHAT, {"max_tokens": "4000"}, 4000),
        (Route.CHAT, {"max_tokens": 4000.0}, 4000),
        (Route.COMPLETIONS, {"prompt": "x", "max_completion_tokens": 1, "max_tokens": 4000}, 4000),
        (Route.COMPLETIONS, {"prompt": ["x"] * 4, "max_tokens": 1000}, 4000),
        (Route.COMPLETIONS, {"prompt": [[1, 2]] * 4, "max_tokens": 1000}, 4008),
        (Route.COMPLETIONS, {"prompt": "x", "best_of": 4, "max_tokens": 1000}, 4000),
        (Route.COMPLETIONS, {"prompt": ["x"] * 2, "n": "2", "max_tokens": 1000}, 4000),
        (Route.COMPLETIONS, {"prompt": [1] * 4000, "max_tokens": 1}, 4001),
        (Route.RESPONSES, {"max_tokens": 1, "max_output_tokens": 4000}, 4000),
        (Route.EMBEDDINGS, {"input": [1] * 4000}, 4000),
    ],
)
def test_what_an_engine_reads_is_expected(route, fields, least):
    assert least <= expected(route, **fields) <= least + 60


@pytest.mark.parametrize(
    ("route", "fields", "number"),
    [
        (Route.EMBEDDINGS, {"input": ["a", "b"]}, 2),
        (Route.CLASSIFY, {"input": ["a", "b"]}, 2),
        (Route.POOLING, {"input": [[1, 2], [3]]}, 2),
        (Route.POOLING, {"messages": [{"role": "user", "content": "x"}]}, 1),
        (Route.RERANK, {"query": "q", "documents": ["a", "b", "c"]}, 3),
        (Route.RERANK, {"query": "q", "documents": "a"}, 1),
        (Route.SCORE, {"text_1": ["a"] * 4, "text_2": ["b"] * 4}, 4),
        (Route.SCORE, {"queries": "a", "documents": ["b"] * 5}, 5),
        (Route.SCORE, {"queries": "a", "items": ["b"] * 6}, 6),
    ],
)
@pytest.mark.parametrize("many", [1, 200_000])
def test_each_text_of_a_pooled_route_is_a_sequence(route, fields, number, many):
    # Long bodies are not parsed.
    padded = {**fields, "padding": "x" * many}
    assert parse_request(route, orjson.dumps({"model": "m", **padded})).sequences == number


@pytest.mark.parametrize(
    ("route", "ignored"),
    [
        (Route.COMPLETIONS, "max_completion_tokens"),
        (Route.RESPONSES, "max_tokens"),
        (Route.RESPONSES, "max_completion_tokens"),
        (Route.EMBEDDINGS, "max_tokens"),
    ],
)
def test_what_engines_ignore_changes_nothing(route, ignored):
    assert expected_tokens(route, {ignored: 1}, 100) == expected_tokens(route, {}, 100)
    assert expected_tokens(route, {ignored: 10**6}, 100) == expected_tokens(route, {}, 100)


PICTURE = "data:image/png;base64," + "A" * 600_000


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (Route.CHAT, {"messages": [{"role": "user", "content": [part]}]})
        for part in (
            {"type": "image_url", "image_url": {"url": PICTURE}},
            {"type": "image_url", "image_url": PICTURE},
            {"type": "input_audio", "input_audio": {"data": "A" * 600_000, "format": "wav"}},
            {"type": "file", "file": {"file_data": PICTURE}},
        )
    ]
    + [
        (
            Route.RESPONSES,
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]}
                ]
            },
        )
    ],
)
def test_media_take_a_bounded_number_of_tokens(route, fields):
    assert IMAGE_TOKENS < expected(route, **fields) < 5000
    assert expected(route, **fields, metadata="x" * 40_000) > 10_000


def test_text_beside_a_picture_is_counted():
    part = {"type": "image_url", "image_url": {"url": PICTURE}, "text": "y" * 400_000}
    messages = [{"role": "user", "content": [part]}]
    assert expected(Route.CHAT, messages=messages) > 100_000


prompts = st.one_of(
    st.text(),
    st.lists(st.text(), min_size=1),
    st.lists(st.integers(0, 10**5), min_size=1),
    st.lists(st.lists(st.integers(0, 10**5), min_size=1), min_size=1),
)


@given(prompts, st.sampled_from([Route.COMPLETIONS, Route.EMBEDDINGS]))
def test_a_raw_prompt_is_never_expected_to_be_less(prompt, route):
    raw = RawJson(orjson.dumps(prompt))
    known, unknown = {route.prompt_field: prompt}, {route.prompt_field: raw}
    assert sequences(route, unknown) >= sequences(route, known) >= 1
    length = len(raw) + 30
    assert expected_tokens(route, unknown, length) >= expected_tokens(route, known, length)


texts = st.text(st.sampled_from('ab"\\[],{} \u00e9'), max_size=30)
whole_prompts = st.one_of(
    st.tuples(st.just(1), texts),
    st.tuples(st.just(1), st.lists(st.integers(0, 10**5), min_size=1)),
    st.lists(texts, min_size=1).map(lambda texts: (len(texts), texts)),
    st.lists(st.lists(st.integers(0, 10**5), min_size=1), min_size=1).map(
        lambda arrays: (len(arrays), arrays)
    ),
)


@given(whole_prompts, st.sampled_from([Route.COMPLETIONS, Route.EMBEDDINGS]), st.booleans())
def test_a_raw_array_of_prompts_is_counted_exactly(counted, route, spaced):
    number, prompt = counted
    raw = json_text(prompt, indent=1).encode() if spaced else orjson.dumps(prompt)
    assert sequences(route, {route.prompt_field: prompt}) == number
    assert sequences(route, {route.prompt_field: RawJson(raw)}) == number


SOURCE = 'print("[", "]")\n' * 5000


@pytest.mark.parametrize(
    ("route", "fields", "number"),
    [
        (Route.CHAT, {}, 1),
        (Route.CHAT, {"n": 24}, 24),
        (Route.CHAT, {"n": None}, 1),
        (Route.CHAT, {"n": 0}, 1),
        (Route.CHAT, {"n": True}, 1),
        (Route.CHAT, {"n": {"n": 3}}, 1),
        (Route.CHAT, {"best_of": 9}, 1),
        (Route.COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 5}, 5),
        (Route.COMPLETIONS, {"prompt": ["x"] * 3, "n": 2}, 6),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3], "n": 2}, 2),
        (Route.COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 2}, 4),
        (Route.COMPLETIONS, {"prompt": [SOURCE]}, 1),
        (Route.COMPLETIONS, {"prompt": [SOURCE, SOURCE], "n": 2}, 4),
        (Route.COMPLETIONS, {"prompt": [list(range(20_000))]}, 1),
        (Route.COMPLETIONS, {"prompt": list(range(700_000))}, 1),
        (Route.RESPONSES, {"input": ["x", "y"], "n": 3}, 1),
        (Route.EMBEDDINGS, {"input": "x", "n": 3}, 1),
        (Route.EMBEDDINGS, {"input": ["x"] * 100}, 100),
        (Route.EMBEDDINGS, {"input": [SOURCE] * 4}, 4),
        (Route.EMBEDDINGS, {"input": [[1, 2, 3]] * 9000}, 9000),
        (Route.EMBEDDINGS, {"input": list(range(9000))}, 1),
        (Route.EMBEDDINGS, {}, 1),
    ],
)
def test_a_request_is_as_many_sequences_as_an_engine_runs_for_it(route, fields, number):
    assert parse_request(route, orjson.dumps({"model": "m", **fields})).sequences == number


def test_a_raw_picture_is_bounded_too():
    raw = RawJson(orjson.dumps([{"content": [{"image_url": {"url": PICTURE}}]}]))
    assert expected_tokens(Route.CHAT, {"messages": raw}, len(raw)) < 5000


json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)
NAMES = ("max_tokens", "n", "best_of", "prompt", "input", "messages", "prompt_embeds")


@given(st.sampled_from(list(Route)), st.dictionaries(st.sampled_from(NAMES), json))
def test_whatever_the_fields_hold_there_is_an_estimate(route, fields):
    assert expected_tokens(route, fields, 10**5) >= 1
    assert sequences(route, fields) >= 1
