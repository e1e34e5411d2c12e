"""Translates engines' error answers to OpenAI's format. Pure."""

from __future__ import annotations

import re
from typing import Any

import orjson

from app.core.errors import (
    ApiError,
    EngineBusy,
    EngineRejected,
    ServerError,
    UnsupportedEndpoint,
)

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


# The field that engines name when a prompt is too long: vLLM its own count, others none.
_PROMPT_LENGTH_PARAMS = frozenset({None, "input_tokens"})


_CONTEXT_LENGTH = re.compile(
    r"context length|context window|maximum (?:input|model) length|max_num_tokens|max_seq_len", re.I
)


# Pydantic's error of one field, as FastAPI servers quote it in their messages: in Python's
# notation, with its location as a tuple or joined by dots.
_PROBLEM = re.compile(
    r"\{'type': '\w+', 'loc': (?P<place>\([^)]*\)|'[^']*'), "
    r"'msg': (?P<quote>['\"])(?P<words>.*?)(?P=quote)(?:, '|\})"
)


_PLACE_NAME = re.compile(r"[^\s'.,()]+")


# FastAPI's validation errors end with the source location that raised them, and an engine may name
# its own files or address. The client must see none of this.
_SOURCE_PLACE = re.compile(r"\n?\s*File \".*?\", line \d+.*", re.DOTALL)


_PATH = re.compile(r"(?<![\w/.:-])/(?:[\w.+@-]+/)+[\w.+@-]*")


_ADDRESS = re.compile(r"\b(?:https?://)?(?:localhost|\d{1,3}(?:\.\d{1,3}){3}):\d+\S*")


# What TensorRT-LLM answers, with 400, where it has failed itself.
_OWN_FAULT = re.compile(
    r"Generation failed\b|Internal server error|CUDA (error|out of memory)", re.I
)


def from_engine(status: int, body: bytes, prompt_field: str, retry_after: str = "") -> ApiError:
    """Translate an engine's error answer.

    ``prompt_field`` is the request field of the prompt, ``retry_after`` the engine's header. The
    supported formats are OpenAI's wrapped one (vLLM, TensorRT-LLM), the unwrapped one (SGLang) and
    FastAPI's ``detail``. 429 and 503 mean that the engine has no room. 401 and 403 concern the
    engine's own key, so they become server errors, as does a 400 that reports the engine's own
    fault. Other 4xx are client errors, with the engine's
    message.
    """
    if status in (429, 503):
        return EngineBusy(status, retry_after)
    if status >= 500 or status in (401, 403):
        return ServerError()
    fields = _error_fields(body)
    if status == 404 and fields.get("message") in (None, "Not Found"):
        return UnsupportedEndpoint()
    quoted = str(fields.get("message") or "The engine refused the request.")
    if status == 400 and _OWN_FAULT.match(quoted):
        return ServerError()
    place, message = _read_problems(quoted) or (None, quoted)
    message = _scrub(message)
    param, code = fields.get("param"), fields.get("code")
    param = place or (param.removeprefix("body.") if isinstance(param, str) else None)
    code = code if isinstance(code, str) and not code.isdigit() else None
    if code is None and param in _PROMPT_LENGTH_PARAMS and _CONTEXT_LENGTH.search(message):
        return EngineRejected(status, message, CONTEXT_LENGTH_EXCEEDED, prompt_field)
    return EngineRejected(status, message, code, param)


def _error_fields(body: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(answer, dict):
        return {}
    error = answer.get("error", answer)
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) and "message" in error else {}


def _read_problems(message: str) -> tuple[str | None, str] | None:
    """Return the first field in a quoted validation error, and the message about it.

    A field that accepts several types has one problem per type.
    """
    found = [
        (_field_of(problem["place"]), problem["words"].removeprefix("Value error, "))
        for problem in _PROBLEM.finditer(message)
    ]
    if not found:
        return None
    first = found[0][0]
    words = "; ".join(dict.fromkeys(words for field, words in found if field == first))
    return first, f"Invalid '{first}': {words}." if first else words


def _field_of(place: str) -> str | None:
    names = [name for name in _PLACE_NAME.findall(place) if name != "body"]
    return names[0] if names else None


def _scrub(message: str) -> str:
    message = _SOURCE_PLACE.sub("", message)
    message = _ADDRESS.sub("[address]", message)
    return _PATH.sub("[path]", message).strip()
