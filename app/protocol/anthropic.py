"""Anthropic's shapes on the messages routes: errors and usage. Pure.

Follows Anthropic's API reference and its Python SDK. In its ``usage``, ``input_tokens`` leaves out
what was read from or written to a prompt cache; Frontline's counts of prompts include both.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from app.core.errors import ApiError
from app.core.pricing import TokenUsage

_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "overloaded_error": 503,
}
_CACHE_READ: Final = "cache_read_input_tokens"
_CACHE_WRITTEN: Final = "cache_creation_input_tokens"


def error_body(error: ApiError, request_id: str | None = None) -> bytes:
    """Return an error as JSON. ``code`` and ``param`` are Frontline's additions."""
    kind = _ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    fields = {"type": kind, "message": error.message, "code": error.code, "param": error.param}
    named = {} if request_id is None else {"request_id": request_id}
    return orjson.dumps({"type": "error", "error": fields, **named})


def error_status(event: dict[str, Any]) -> int:
    """Return the HTTP status that an engine's error event stands for."""
    error = event.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    return _STATUS_OF_TYPE.get(kind, 500) if isinstance(kind, str) else 500


def plain_usage(usage: object) -> object:
    """Return a ``usage`` object with OpenAI's names and meaning; other values unchanged."""
    if not isinstance(usage, dict):
        return usage
    read, written = usage.get(_CACHE_READ), usage.get(_CACHE_WRITTEN)
    output = usage.get("output_tokens")
    parts = [usage.get("input_tokens"), *(part for part in (read, written) if part is not None)]
    possible = all(type(part) is int and part >= 0 for part in parts)
    return {
        # One impossible part makes the whole impossible.
        "prompt_tokens": sum(parts) if possible else -1,
        "completion_tokens": -1 if output is None else output,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
    }


def usage_fields(usage: TokenUsage) -> dict[str, Any]:
    """Return the ``usage`` object for these tokens."""
    written = usage.cache_write_tokens
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - written,
        _CACHE_READ: usage.cached_tokens,
        **({_CACHE_WRITTEN: written} if written else {}),
        "output_tokens": usage.completion_tokens,
    }
