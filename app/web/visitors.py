"""Who looks at a page: by the cookie of a browser that has signed in, or by an API key."""

from __future__ import annotations

import time
from http.cookies import CookieError, SimpleCookie
from typing import Final

from fastapi import Request

from app.gateway.client_address import HeaderLines, may_come_from, require_address
from app.gateway.handler import identify, require_admin
from app.gateway.request_body import Headers
from app.gateway.services import Services
from app.tenants.access import Caller, caller_of

COOKIE: Final = "frontline_session"


async def visitor(services: Services, request: Request) -> Caller:
    """Return who looks at a page. Pages of models are as public as ``GET /v1/models``.

    Raises:
        HostNotAllowed: the request names a host that is not served here.
        InvalidKey: keys are required, and the request has none that works, and no session.
        AddressNotAllowed: the key may not be used from the visitor's address.
    """
    lines: HeaderLines = request.scope["headers"]
    headers = dict(lines)
    token = None if b"authorization" in headers else session_token(headers)
    if token is None:
        return await identify(services, lines)
    await services.ready.wait()
    services.settings.host_rule.require(headers)
    access = services.access
    caller = None if access is None else await access.session(token, time.time())
    if caller is None:
        return await identify(services, lines)
    require_address(services, caller, lines)
    return caller


async def admin(services: Services, request: Request) -> Caller:
    """Return who looks at the board; where no keys are required, it is as open as the API.

    Raises:
        HostNotAllowed, InvalidKey, AddressNotAllowed: see ``visitor``.
        AdminRequired: the visitor's key is not an admin key.
    """
    caller = await visitor(services, request)
    require_admin(services, caller, "The board shows the traffic of all tenants.")
    return caller


def still_admin(services: Services, caller: Caller, lines: HeaderLines) -> bool:
    """Return whether somebody who was let in to the board may go on. Reads no store."""
    access, headers = services.access, dict(lines)
    if access is None or caller.key is None:
        return access is None and caller.key is None
    token = None if b"authorization" in headers else session_token(headers)
    if token is None:
        known = access.known_key(caller.key_id)
        now = None if known is None else caller_of(known)
    else:
        now = access.known_session(token, time.time())
    return now is not None and now.is_admin and may_come_from(services, now, lines)


def session_token(headers: Headers) -> str | None:
    """Return the session token in a request's cookies, or ``None``."""
    text = headers.get(b"cookie")
    if text is None:
        return None
    try:
        cookie = SimpleCookie(text.decode("latin-1")).get(COOKIE)
    except CookieError:
        return None
    return None if cookie is None else cookie.value
