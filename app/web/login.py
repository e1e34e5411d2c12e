"""``/login`` and ``/logout``: a browser exchanges an API key for a session cookie."""

from __future__ import annotations

import time
from typing import Final
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from app import alarms
from app.core import errors
from app.gateway.client_address import require_address
from app.gateway.cross_site import require_same_origin
from app.gateway.services import Services
from app.gateway.short_body import read_short_body
from app.tenants.access import Access, caller_of
from app.tenants.keys import ApiKey
from app.tenants.sessions import SESSION_S, create_session
from app.web.pages import Answer, add_page, error_page, render
from app.web.visitors import COOKIE

FAILURES: Final = 20
"""Failed sign-ins that one ingress answers in a minute, from all browsers together. A key has 256
random bits and cannot be guessed; the bound keeps the log and the database quiet. A key that is
known here signs in regardless."""
_MINUTE_S: Final = 60.0
_LONGEST_FORM: Final = 4096
_AFTER: Final = frozenset({"/", "/board", "/usage"})


class FailureLimit:
    """Bounds failed sign-ins. Pure: the time is passed in, in seconds."""

    def __init__(self) -> None:
        self._left = float(FAILURES)
        self._at = -float("inf")

    def wait_s(self, now: float) -> float:
        """Return how long nobody may fail, in seconds; 0 if one more may."""
        return max(0.0, 1 - self._refilled(now)) * _MINUTE_S / FAILURES

    def failed(self, now: float) -> None:
        """Count a failure."""
        self._left, self._at = max(0.0, self._refilled(now) - 1), now

    def _refilled(self, now: float) -> float:
        return min(FAILURES, self._left + max(0.0, now - self._at) * FAILURES / _MINUTE_S)


def add_login_routes(api: FastAPI, services: Services) -> None:
    """Add the form, and the routes that it and the button to sign out post to."""
    limit = FailureLimit()

    async def show(request: Request) -> Response:
        await _require_host(services, request)
        after = _after(request.query_params.get("next"))
        return _to(after) if services.access is None else _form(after)

    async def sign_in(request: Request) -> Response:
        await _require_host(services, request)
        require_same_origin(dict(request.scope["headers"]))
        form = await _read_form(request)
        after = _after(form.get("next"))
        if services.access is None:
            return _to(after)
        try:
            key = await _sign_in(services.access, form.get("key", "").strip(), limit)
            require_address(services, caller_of(key), request.scope["headers"])
        except (errors.TooManySignIns, errors.InvalidKey, errors.AddressNotAllowed) as error:
            return _form(after, error)
        answer, token = _to(after), create_session(key, time.time())
        answer.set_cookie(
            COOKIE, token, max_age=SESSION_S, httponly=True, samesite="strict",
            secure=_is_secure(request),
        )  # fmt: skip
        return answer

    async def sign_out(request: Request) -> Response:
        await _require_host(services, request)
        require_same_origin(dict(request.scope["headers"]))
        answer = _to("/login")
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_is_secure(request))
        return answer

    add_page(api, "/login", show)
    api.router.routes.append(_Post("/login", sign_in))
    api.router.routes.append(_Post("/logout", sign_out))


async def _sign_in(access: Access, text: str, limit: FailureLimit) -> ApiKey:
    """Return the key that somebody has typed.

    Raises:
        InvalidKey: it does not work.
        TooManySignIns: too many have failed.
    """
    wait_s = limit.wait_s(time.monotonic())
    if wait_s and not access.knows_key(text):
        raise errors.TooManySignIns(wait_s)
    key = await access.sign_in(text)
    if key is None:
        limit.failed(time.monotonic())
        alarms.PROCESS.raised("sign-in refused", "somebody typed a key that does not work")
        raise errors.InvalidKey(given=True)
    return key


async def _require_host(services: Services, request: Request) -> None:
    await services.ready.wait()
    services.settings.host_rule.require(dict(request.scope["headers"]))


async def _read_form(request: Request) -> dict[str, str]:
    body = await read_short_body(request, _LONGEST_FORM)
    return dict(parse_qsl(body.decode("latin-1"), max_num_fields=10))


def _form(after: str, error: errors.ApiError | None = None) -> Response:
    status, headers, message = 200, None, ""
    if error is not None:
        # A browser that gets this header would show a form of its own.
        headers = {n: v for n, v in error.headers.items() if n != "www-authenticate"}
        status, message = error.status, error.message
    return render(
        "login.html", status=status, headers=headers, after=after, message=message, here=after
    )


def _after(path: str | None) -> str:
    """Return where to go after signing in: a page of this server and nothing else."""
    return path if path in _AFTER else "/usage"


def _to(path: str) -> Response:
    return RedirectResponse(path, 303, {"cache-control": "no-store"})


def _is_secure(request: Request) -> bool:
    """Return whether a browser has sent a request by HTTPS.

    A client that claims it falsely only gets a cookie that its browser does not keep.
    """
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return request.url.scheme == "https" or forwarded == "https"


class _Post(Route):
    """A form's target. For other methods nothing is there."""

    def __init__(self, path: str, answer: Answer) -> None:
        async def explained(request: Request) -> Response:
            try:
                return await answer(request)
            except errors.ApiError as error:
                return error_page(error)

        super().__init__(path, explained, methods=["POST"])

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if match is Match.FULL else (Match.NONE, {})
