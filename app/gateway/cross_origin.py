"""Lets web pages of other origins call the API, where the operator allows it (CORS).

Browsers ask before a page of another origin may send JSON or a key (the preflight), and let it
read an answer only if that answer names its origin. Starlette's middleware answers both, for the
origins of the ``cors_origins`` setting. Other requests are handled as if there were none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.middleware.cors import CORSMiddleware

from app.config.origins import OriginRule

_REMEMBERED_S: Final = 600
"""How long a browser may keep a preflight's answer, in seconds."""
EXPOSED: Final = (
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-engine",
    "x-queue-time-ms",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-request-id",
    "x-service-tier",
    "x-service-tier-reason",
    "x-shed-reason",
)
"""The headers of answers that a page may read besides those that it always may."""

App = Callable[[Any, Any, Any], Awaitable[None]]


class CrossOrigin:
    """An application around another one, which adds what browsers require for allowed origins.

    Args:
        app: the application.
        rule: returns the rule in force; it changes with the settings.
    """

    def __init__(self, app: App, rule: Callable[[], OriginRule]) -> None:
        self._app = app
        self._rule = rule
        self._made_for: OriginRule | None = None
        self._middleware: App = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        rule = self._rule()
        if rule.none or not rule.allows(_origin(scope["headers"])):
            await self._app(scope, receive, send)
            return
        if rule is not self._made_for:
            self._middleware = _around(self._app, rule)
            self._made_for = rule
        await self._middleware(scope, receive, send)


def _around(app: App, rule: OriginRule) -> App:
    # No credentials: they would be cookies, and the API's keys are in a header.
    return CORSMiddleware(
        app,
        allow_origin_regex=rule.pattern,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
        max_age=_REMEMBERED_S,
    )


def _origin(headers: list[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == b"origin":
            return value.decode("latin-1")
    return None
