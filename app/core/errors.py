"""Errors sent to clients: OpenAI's shape, in one tree.

    ApiError
    ├── InvalidRequest       400  the request itself is invalid
    │   ├── InvalidKey       401  no API key, or one that does not work
    │   ├── HostNotAllowed   403  the `Host` header is not one that this ingress serves
    │   ├── ModelNotFound    404
    │   ├── UnknownUrl       404
    │   ├── MethodNotAllowed 405
    │   ├── RequestTimeout   408
    │   ├── BodyTooLarge     413
    │   ├── UnsupportedMediaType 415  the body is not declared to be JSON
    │   └── Overloaded       429  shed by the queue; carries Retry-After
    ├── RateLimited          429  over a limit of its key; carries Retry-After
    ├── TooManyInFlight      429  over a bound on requests in flight; carries Retry-After
    ├── UsageBusy            429  too many usage queries at once; carries Retry-After
    ├── EngineRejected       4xx  the engine rejected the request; its own message
    └── ServerError          500
        ├── EngineBusy       429, 503  the engine has no room; its status and Retry-After
        └── Unavailable      503  nothing can serve the model now; carries Retry-After

Messages and codes follow OpenAI's API reference (error codes) and its service's answers. No message
reveals where or how a request was served.
"""

from __future__ import annotations

import math
import re
from typing import Any

import orjson


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: the HTTP status.
        type: OpenAI's ``error.type``.
        code: OpenAI's ``error.code``, or ``None``.
        param: the request field at fault, or ``None``.
        headers: further response headers.
    """

    status: int = 500
    type: str = "server_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.headers: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's ``{"error": {...}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def body(self) -> bytes:
        """Return ``to_dict`` as JSON."""
        return orjson.dumps(self.to_dict())


class InvalidRequest(ApiError):
    """The request is invalid; a retry will not help."""

    status = 400
    type = "invalid_request_error"


class InvalidKey(InvalidRequest):
    """The request has no valid API key. The message does not repeat the key."""

    status = 401

    def __init__(self, *, given: bool) -> None:
        super().__init__(
            "Incorrect API key provided."
            if given
            else "You didn't provide an API key. You need to provide your API key in an "
            "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
            code="invalid_api_key",
        )
        self.headers["www-authenticate"] = "Bearer"


class HostNotAllowed(InvalidRequest):
    """The request names a host that this ingress does not serve. The message does not repeat it."""

    status = 403

    def __init__(self) -> None:
        super().__init__(
            "Requests to this server must name it in their Host header as localhost, 127.0.0.1, "
            "[::1], or a host that its operator has listed in allowed_hosts.",
            code="host_not_allowed",
        )


class ModelNotFound(InvalidRequest):
    """No model application has this id or alias."""

    status = 404

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{_shown(model)}` does not exist or you do not have access to it.",
            code="model_not_found",
            param="model",
        )


class UnknownUrl(InvalidRequest):
    """No such route."""

    status = 404

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Invalid URL ({method} {path[:200]})", code="unknown_url")


class MethodNotAllowed(InvalidRequest):
    """The route exists, with another method."""

    status = 405

    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(
            f"Not allowed to {method} on {path[:200]}; use {allowed}.", code="method_not_supported"
        )
        self.headers["allow"] = allowed


class RequestTimeout(InvalidRequest):
    """The client did not finish sending its request in time."""

    status = 408

    def __init__(self) -> None:
        super().__init__("Timed out reading the request body.", code="request_timeout")
        # The rest of the body must not be read as another request.
        self.headers["connection"] = "close"


class BodyTooLarge(InvalidRequest):
    """The request body is longer than the operator allows."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The request body is too large: at most {limit} bytes are accepted.",
            code="request_too_large",
        )
        self.headers["connection"] = "close"


class UnsupportedMediaType(InvalidRequest):
    """The content type of the body is missing, or not JSON."""

    status = 415

    def __init__(self, *, given: bool) -> None:
        super().__init__(
            f"{'Unsupported' if given else 'Missing'} Content-Type: the body must be JSON, sent "
            "with the header 'Content-Type: application/json' "
            "(with curl: -H 'Content-Type: application/json').",
            code="unsupported_media_type",
        )


class Overloaded(InvalidRequest):
    """The queue has shed the request. The message and the type are DeepInfra's."""

    status = 429

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("Model busy, retry later", code="engine_overloaded")
        self.headers |= _retry_headers(retry_after_s)


class RateLimited(ApiError):
    """The request exceeds a limit of its key; ``what``: ``requests`` or ``tokens`` per minute.

    ``type`` and wording are those of OpenAI's service, where the type names the limit.
    """

    status = 429

    def __init__(self, what: str, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"Rate limit reached on {what} per min: Limit {limit}. "
            f"Please try again in {max(retry_after_s, 0.001):.3g}s.",
            code="rate_limit_exceeded",
        )
        self.type = what
        self.headers |= _retry_headers(retry_after_s)


class UsageBusy(ApiError):
    """The bound on concurrent usage queries is reached."""

    status = 429
    type = "requests"

    def __init__(self) -> None:
        super().__init__(
            "Too many requests for usage at once. Please try again in 1s.",
            code="rate_limit_exceeded",
        )
        self.headers |= _retry_headers(1.0)


class TooManyInFlight(ApiError):
    """The request exceeds the ``limit`` of requests in flight here, for its key or tenant."""

    status = 429
    type = "requests"

    def __init__(self, holder: str, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"Too many requests in flight for this {holder}: Limit {limit}. "
            f"Please try again in {retry_after_s:.3g}s, or wait until others have ended.",
            code="concurrency_limit_exceeded",
        )
        self.headers |= _retry_headers(retry_after_s)


class EngineRejected(ApiError):
    """The engine rejected the request; the message is the engine's."""

    type = "invalid_request_error"

    def __init__(self, status: int, message: str, code: str | None, param: str | None) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status


class ServerError(ApiError):
    """Something failed that is not the client's fault."""

    def __init__(
        self, message: str = "The server had an error while processing your request.",
        code: str | None = "engine_error",
    ) -> None:  # fmt: skip
        super().__init__(message, code=code)


class Unavailable(ServerError):
    """Nothing can serve this model now; a later retry may succeed."""

    status = 503

    def __init__(self, message: str, code: str, retry_after_s: float) -> None:
        super().__init__(message, code=code)
        self.headers |= _retry_headers(retry_after_s)


def no_memory(reason: str, retry_after_s: float) -> Unavailable:
    """Return the error for a request whose body does not fit in this ingress's memory now.

    The body stays unread, so the connection cannot serve another request.
    """
    error = Unavailable(
        "The bodies of the requests that wait or run here take all the memory that they may. Try "
        "again in a few seconds.",
        "request_memory_full",
        retry_after_s,
    )
    error.headers |= {"x-shed-reason": reason, "connection": "close"}
    return error


class EngineBusy(ServerError):
    """Every engine tried is overloaded, and has generated nothing.

    ``status`` is the engine's own. ``retry_after`` is its header, in seconds. Values above 60, the
    longest that the OpenAI SDKs wait, and malformed values count as absent.
    """

    def __init__(self, status: int, retry_after: str = "") -> None:
        super().__init__("Model busy, retry later", code="engine_overloaded")
        self.status = status
        sane = _SECONDS.fullmatch(retry_after) is not None
        self.headers |= _retry_headers(int(retry_after) if sane else _BUSY_S)


def unlisted(model: str, retry_after_s: float) -> Unavailable:
    """Return the error for a request whose model may exist, but is not known here yet."""
    return Unavailable(
        f"It is not known yet whether the model `{_shown(model)}` exists. Try again in a moment.",
        "engine_not_ready",
        retry_after_s,
    )


def _shown(model: str) -> str:
    return model if len(model) <= 200 else model[:200] + "..."


def _retry_headers(seconds: float) -> dict[str, str]:
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }


# Used if an engine sends no time for a retry: a few of its requests have ended by then.
_BUSY_S = 5
_SECONDS = re.compile(r"[1-5]?[0-9]|60")
