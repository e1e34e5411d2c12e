"""How a page is made and answered: templates, security headers, and errors in plain words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.routing import Match, Route
from starlette.types import Scope

from app.core import errors
from app.web.static_files import static_url

CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
"""Pages load only what this ingress serves. Inline scripts and styles are refused, so a text that
should have been escaped does no harm."""

_HEADERS: Final = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    # With `no-referrer`, a form on the page would be sent with `Origin: null`.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    # A page shows what holds now, and may show what only its reader may see.
    "cache-control": "private, no-cache",
    "vary": "accept, authorization, cookie",
}

NAVIGATION: Final = (("Models", "/"), ("Board", "/board"), ("Usage", "/usage"))
"""The pages named at the top of every page: what they are called, and their paths."""

_templates: Final = Environment(
    loader=PackageLoader("app.web"),
    autoescape=True,
    auto_reload=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals.update(static=static_url, navigation=NAVIGATION)

Answer = Callable[[Request], Awaitable[Response]]


def render(
    template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **context: Any
) -> Response:
    """Return a page: a template of ``app/web/templates``, filled in.

    Every value is escaped. ``here`` in the context is the path of the page in ``NAVIGATION`` that
    it belongs to.
    """
    page = render_part(template, **context)
    return HTMLResponse(page, status, {**_HEADERS, **(headers or {})})


def render_part(template: str, **context: Any) -> Markup:
    """Return a part of a page, to be put into others as it is."""
    return Markup(_templates.get_template(template).render({"here": "", **context}))


def compile_templates() -> None:
    """Compile all templates now. Otherwise the first reader of each page holds up all requests."""
    for name in _templates.list_templates():
        _templates.get_template(name)


def add_page(api: FastAPI, path: str, answer: Answer) -> None:
    """Serve a page to browsers at ``path``.

    To other clients, which do not accept HTML, nothing is there: they get OpenAI's error for an
    unknown URL. An ``ApiError`` that ``answer`` raises becomes a page too.
    """
    api.router.routes.append(_PageRoute(path, _explaining(answer), methods=["GET"]))


def accepts_html(accept: str) -> bool:
    """Return whether an ``Accept`` header names HTML; ``*/*`` alone does not count."""
    for one in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in one.split(";"))
        if kind == "text/html":
            return not any(_is_zero(parameter) for parameter in parameters)
    return False


def _is_zero(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return name == "q" and value.strip("0") in ("", ".")


class _PageRoute(Route):
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is not Match.FULL or not accepts_html(_accept(scope)):
            return Match.NONE, {}
        return match, child


def _accept(scope: Scope) -> str:
    values = (value for name, value in scope["headers"] if name == b"accept")
    return ",".join(value.decode("latin-1") for value in values)


def _explaining(answer: Answer) -> Answer:
    async def explained(request: Request) -> Response:
        try:
            return await answer(request)
        except errors.ApiError as error:
            return error_page(error)

    return explained


def error_page(error: errors.ApiError) -> Response:
    """Return the page that explains an error."""
    return render(
        "error.html",
        status=error.status,
        headers=error.headers,
        number=error.status,
        heading=HTTPStatus(error.status).phrase,
        message=error.message,
        sign_in=isinstance(error, errors.InvalidKey | errors.AdminRequired),
    )
