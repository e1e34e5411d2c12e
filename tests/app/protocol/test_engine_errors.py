import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import errors
from app.protocol import engine_errors

pytestmark = pytest.mark.unit


def from_engine(status, body, prompt_field="messages"):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return engine_errors.from_engine(status, raw, prompt_field)


VLLM = {
    "error": {"message": "too hot", "type": "BadRequestError", "param": "temperature", "code": 400}
}
SGLANG = {"object": "error", "message": "too hot", "type": "Bad", "param": None, "code": 400}


@pytest.mark.parametrize(("body", "param"), [(VLLM, "temperature"), (SGLANG, None)])
def test_an_engines_refusal_is_passed_on_in_openais_shape(body, param):
    error = from_engine(400, body)
    assert error.status == 400
    assert error.to_dict()["error"] == {
        "message": "too hot",
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }


def test_a_prompt_that_is_too_long_names_the_field_of_the_prompt():
    body = {"error": {"message": "maximum context length is 9 tokens", "param": "input_tokens"}}
    error = from_engine(400, body, "prompt")
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")


def test_an_answer_that_is_too_long_names_its_own_field():
    body = {"error": {"message": "cannot exceed the context length", "param": "max_tokens"}}
    error = from_engine(400, body)
    assert (error.code, error.param) == (None, "max_tokens")


def test_a_validation_error_names_the_request_field_without_fastapis_prefix():
    body = {"error": {"message": "Field required", "param": "body.messages", "code": 400}}
    assert from_engine(400, body).param == "messages"


PROBLEM = "{'type': 'string_type', 'loc': ('body', 'stop', 'str'), 'msg': 'Should be a string', "
OTHER = "{'type': 'list_type', 'loc': ('body', 'stop', 'list[str]'), 'msg': 'Should be a list', "
DOTTED = "{'type': 'string_type', 'loc': 'body.stop.str', 'msg': 'Should be a string', "
AS_LIST = f"[{PROBLEM}'input': 7}}, {OTHER}'input': 7}}]"
AS_LINES = (
    f"2 validation errors:\n  {DOTTED}'input': 7}}\n  {OTHER}'input': 7}}\n\n  File \"/a.py\""
)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": AS_LINES, "param": "body.stop"}},
        {"object": "error", "message": AS_LIST, "param": None},
        {"error": AS_LIST},
    ],
)
def test_quoted_validation_errors_become_a_sentence_and_a_field(body):
    error = from_engine(400, body)
    assert error.param == "stop"
    assert error.message == "Invalid 'stop': Should be a string; Should be a list."


def test_a_validation_error_of_the_whole_body_has_no_field():
    quoted = (
        "[{'type': 'value_error', 'loc': ('body',), 'msg': \"Value error, it's no good\", 'i': 1}]"
    )
    error = from_engine(400, {"error": quoted})
    assert (error.param, error.message) == (None, "it's no good")


@pytest.mark.parametrize(
    "words",
    [
        "The sum of prompt length (9.0), query length (0) should not exceed max_num_tokens (8)",
        "`default_max_tokens` (-1) must be greater than 0, `default_max_tokens` (-1) = "
        "max_seq_len (8) - `splited_prompt_len` (9) - `query_token_len` (0)",
    ],
)
def test_tensorrt_llms_words_for_too_long_a_prompt(words):
    error = from_engine(400, {"object": "error", "message": words, "param": None, "code": 400})
    assert (error.code, error.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("status", [401, 403, 500, 502, 504])
def test_an_engines_own_trouble_is_told_without_its_words(status):
    error = from_engine(status, {"error": {"message": "CUDA at /opt/x.py line 3"}})
    assert error.status == 500
    assert "CUDA" not in error.message


@pytest.mark.parametrize("status", [429, 503])
@given(
    header=st.one_of(
        st.integers(0, 60).map(str),
        st.integers(61).map(str),
        st.sampled_from(["", "-1", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "\u00b2", "9" * 5000]),
        st.text(st.characters(codec="latin-1")),
    )
)
def test_an_engine_without_room_keeps_its_status_and_a_sane_retry_after(status, header):
    error = engine_errors.from_engine(status, b"queue of 10.0.0.1:80 is full", "messages", header)
    assert (error.status, error.code, error.message) == (
        status, "engine_overloaded", "Model busy, retry later",
    )  # fmt: skip
    told = {str(seconds): max(1, seconds) for seconds in range(61)}.get(header, 5)
    assert error.headers["retry-after"] == str(told)


@pytest.mark.parametrize(
    "body", [{"detail": "Not Found"}, {"error": {"message": "Not Found", "code": 404}}]
)
def test_a_route_that_the_engine_lacks_is_the_models_matter(body):
    error = from_engine(404, body)
    assert (error.status, error.param, error.code) == (400, "model", "unsupported_endpoint")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"x"', b'{"error": []}'])
def test_an_unreadable_refusal_still_has_a_shape(body):
    assert from_engine(422, body).to_dict()["error"]["message"]


@pytest.mark.parametrize(
    "secret",
    [
        '  File "/opt/venv/lib/api.py", line 12, in create\n    POST /v1/chat',
        "/opt/venv/lib/api.py",
        "http://127.0.0.1:43211/v1/models",
        "10.1.2.3:8000",
        "localhost:9000",
    ],
)
def test_paths_addresses_and_traces_are_taken_out(secret):
    message = from_engine(400, {"message": f"bad value\n{secret}"}).message
    assert message.startswith("bad value")
    assert not any(part in message for part in ("/opt", "line 12", "43211", "8000", "9000"))


def test_ordinary_words_are_left_alone():
    text = "temperature must be in [0, 2] and/or top_p in 0/1, see input.messages[3]"
    assert from_engine(400, {"message": text}).message == text


def test_retry_after_is_in_whole_seconds_and_milliseconds():
    error = errors.Unavailable("later", "engine_not_ready", 1.2345)
    assert (error.headers["retry-after"], error.headers["retry-after-ms"]) == ("2", "1235")


def test_a_wrong_key_is_not_repeated_back():
    for was_given in (True, False):
        error = errors.InvalidKey(given=was_given)
        assert (error.status, error.code, error.param) == (401, "invalid_api_key", None)
        assert error.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "words",
    [
        "Generation failed: CUDA error: an illegal memory access was encountered",
        "Generation failed",
        "CUDA out of memory. Tried to allocate 2 GiB",
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_an_engines_own_fault_is_not_the_requests(words, wrapped):
    """410afd7: TensorRT-LLM's 400 was passed on as one, so that no client tried again."""
    error = {"message": words, "type": "BadRequestError", "param": None, "code": 400}
    found = from_engine(400, {"error": error} if wrapped else error)
    assert found.status == 500 and "CUDA" not in found.message
    assert from_engine(400, {"message": f"Invalid prompt: '{words}'"}).status == 400
