"""Errors sent to clients: OpenAI's shape, in one tree.

    ApiError
    ├── InvalidRequest       400  the request itself is invalid
    │   ├── InvalidKey       401  no API key, or one that does not work
    │   ├── UnsupportedEndpoint 400  no engine of the model has the route
    │   ├── HostNotAllowed   403  the `Host` header is not one that this ingress serves
    │   ├── CrossSite        403  a browser sent it for a page of another site
    │   ├── AdminRequired    403  the key is not an admin key
    │   ├── AddressNotAllowed 403  the key may not be used from the client's address
    │   ├── BeyondOwnRights  403  an admin key would give more rights than it has
    │   ├── ModelNotFound    404
    │   ├── KeyNotFound      404
    │   ├── UnknownUrl       404
    │   ├── MethodNotAllowed 405
    │   ├── TierUnavailable  400, 403, 429  the tier must not be lowered, and cannot be had
    │   ├── WebSocketRefused 426  the client wants a WebSocket
    │   ├── RequestTimeout   408
    │   ├── BodyTooLarge     413
    │   ├── UnsupportedMediaType 415  the body is not declared to be JSON
    │   ├── UnsupportedEncoding 415  the body is compressed in a way that is not decoded
    │   └── Overloaded       429  shed by the queue; carries Retry-After
    ├── RateLimited          429  over a limit of its key; carries Retry-After
    ├── InsufficientQuota    429  over a budget of its key or tenant
    ├── TooManyInFlight      429  over a bound on requests in flight; carries Retry-After
    ├── UsageBusy            429  too many usage queries at once; carries Retry-After
    ├── KeysBusy             429  too many requests for keys at once; carries Retry-After
    ├── TooManySignIns       429  too many failed sign-ins; carries Retry-After
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
from collections.abc import Iterable
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
            "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY), or in "
            "an x-api-key header.",
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


class CrossSite(InvalidRequest):
    """A browser sent the request for a page of another site, or it does not say for which."""

    status = 403

    def __init__(self) -> None:
        super().__init__(
            "This request must come from a page of this server: a browser says so in its "
            "Sec-Fetch-Site or Origin header.",
            code="cross_site_request",
        )


class AdminRequired(InvalidRequest):
    """The key works, but it is not an admin key. ``why`` says why one is needed, in a sentence."""

    status = 403

    def __init__(self, why: str) -> None:
        super().__init__(
            f"{why} It needs an admin key (frontline keys create --admin).",
            code="admin_key_required",
        )


class RouteNotAllowed(InvalidRequest):
    """The key works, but not for this route."""

    status = 403

    def __init__(self, route: str) -> None:
        super().__init__(
            f"This API key may not be used for {route}. GET /v1/me lists its routes.",
            code="route_not_allowed",
        )


class AddressNotAllowed(InvalidRequest):
    """The key works, but not from the client's address. The message names no address."""

    status = 403

    def __init__(self) -> None:
        super().__init__(
            "This API key may not be used from the address that this request came from.",
            code="address_not_allowed",
        )


class BeyondOwnRights(InvalidRequest):
    """An admin key would give a key more rights than it has itself; ``param`` says which."""

    status = 403

    def __init__(self, param: str) -> None:
        super().__init__(
            f"An admin key cannot give more rights than it has: '{param}' must be within its own.",
            code="beyond_own_rights",
            param=param,
        )


class KeyNotFound(InvalidRequest):
    """No key has this id, or it has been revoked already and cannot be changed."""

    status = 404

    def __init__(self, key_id: str) -> None:
        super().__init__(
            f"No API key with the id '{_shown(key_id)}' is found, or it is revoked.",
            code="key_not_found",
        )


class UnsupportedEndpoint(InvalidRequest):
    """The model's engines do not have the route."""

    def __init__(self) -> None:
        super().__init__(
            "This model does not support this endpoint.", code="unsupported_endpoint", param="model"
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


class WebSocketRefused(InvalidRequest):
    """The client asks for a WebSocket. Clients that can do without one then use HTTP."""

    status = 426

    def __init__(self, path: str) -> None:
        super().__init__(
            f"No WebSocket is served at {path[:200]}; use HTTP.", code="websocket_not_supported"
        )
        # The protocol that the client is to use instead; the header is required with this status.
        self.headers |= {"upgrade": "HTTP/1.1", "connection": "Upgrade"}


class TierUnavailable(InvalidRequest):
    """The tier that the request insists on cannot be served; ``reason`` is in a header."""

    def __init__(self, status: int, reason: str, retry_after_s: float | None) -> None:
        super().__init__(
            f"The service tier cannot be served ({reason}), and a lower one is not wanted.",
            code="service_tier_unavailable",
            param="service_tier",
        )
        self.status = status
        self.headers["x-service-tier-reason"] = reason
        if retry_after_s is not None:
            self.headers |= _retry_headers(retry_after_s)


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
    """The content type of the body is missing, or not the route's: JSON, or ``form`` data."""

    status = 415

    def __init__(self, *, given: bool, form: bool = False) -> None:
        must_be = (
            "JSON, sent with the header 'Content-Type: application/json' "
            "(with curl: -H 'Content-Type: application/json')."
        )
        if form:
            must_be = "a form, 'multipart/form-data' (with curl: -F file=@NAME -F model=MODEL)."
        super().__init__(
            f"{'Unsupported' if given else 'Missing'} Content-Type: the body must be {must_be}",
            code="unsupported_media_type",
        )


class UnsupportedEncoding(InvalidRequest):
    """The body's content coding is not decoded here; ``known`` are those that are."""

    status = 415

    def __init__(self, known: Iterable[str]) -> None:
        names = ", ".join(known)
        super().__init__(
            f"Unsupported Content-Encoding: send the body as it is, or one of {names}.",
            code="unsupported_content_encoding",
        )
        self.headers["accept-encoding"] = names


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


class InsufficientQuota(ApiError):
    """A budget of the request's key or tenant is spent. Type, code and message are OpenAI's.

    There is no ``Retry-After``: the next period may be weeks away, and a total never ends. The
    clients of OpenAI and Anthropic retry a 429 unless ``x-should-retry`` forbids it.
    """

    status = 429
    type = "insufficient_quota"

    def __init__(self) -> None:
        super().__init__(
            "You exceeded your current quota, please check your plan and billing details. "
            "GET /v1/me shows the budgets of your API key.",
            code="insufficient_quota",
        )
        self.headers["x-should-retry"] = "false"


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


class KeysBusy(ApiError):
    """Too many requests read or change keys at once."""

    status = 429
    type = "requests"

    def __init__(self) -> None:
        super().__init__(
            "Too many requests for keys at once. Please try again in 1s.",
            code="rate_limit_exceeded",
        )
        self.headers |= _retry_headers(1.0)


class TooManySignIns(ApiError):
    """Too many sign-ins have failed here lately."""

    status = 429
    type = "requests"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(
            "Too many sign-ins have failed. Please try again in a minute.",
            code="rate_limit_exceeded",
        )
        self.headers |= _retry_headers(retry_after_s)


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


class RequestTookTooLong(ServerError):
    """The request took longer than Serve's ``request_timeout_s`` allows."""

    status = 408

    def __init__(self, longest_s: float) -> None:
        super().__init__(f"The request took longer than {longest_s:g} s.", code="request_timeout")


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


def spend_unknown(retry_after_s: float) -> Unavailable:
    """Return the error for a request of a key whose spend cannot be read."""
    return Unavailable(
        "What this API key has spent of its budget cannot be read at the moment, so the request "
        "was not served. Try again in a few seconds.",
        "budget_unavailable",
        retry_after_s,
    )


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
