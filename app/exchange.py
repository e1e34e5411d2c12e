"""A request as it comes in over HTTP: its body, read within bounds, and its answer or error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from app import cross_site, errors
from app.accounts import NOBODY, Caller
from app.config import IngressSettings
from app.dialect import Route
from app.openai_api import parse_request
from app.passage import Passage, Services
from app.reply import Reply, Send

Scope = MutableMapping[str, Any]
Headers = Mapping[bytes, bytes]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """The client closed its connection before its request was complete."""


class Exchange:
    """The ASGI application of one route that an engine answers."""

    def __init__(self, route: Route, services: Services) -> None:
        self._route = route
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services, reply = self._services, Reply(send)
        try:
            headers = dict(scope["headers"])
            caller = await identify(services, headers)
            cross_site.require_json(headers)
            body = await _read_body(headers, receive, services.settings)
            inbound = parse_request(self._route, body)
            admission = services.catalog.require(inbound.model)
            await Passage(services, admission, caller, inbound, reply).run()
        except errors.ApiError as error:
            await reply.refuse(error)
        except ClientGone:
            return
        except Exception:
            if not reply.started:
                await reply.refuse(errors.ServerError(code="internal_error"))
            # Serve writes it to its log.
            raise


async def identify(services: Services, headers: Headers) -> Caller:
    """Return who sends a request, once this ingress is ready and before its body is read.

    Raises:
        HostNotAllowed: it names a host that is not served here.
        InvalidKey: keys are asked for, and it carries none that works.
    """
    if not services.ready.is_set():
        await services.ready.wait()
    services.settings.host_rule.require(headers)
    if services.accounts is None:
        return NOBODY
    authorization = headers.get(b"authorization")
    text = None if authorization is None else authorization.decode("latin-1")
    return await services.accounts.identify(text)


async def _read_body(headers: Headers, receive: Receive, settings: IngressSettings) -> bytes:
    limit = settings.max_body_bytes
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise errors.BodyTooLarge(limit)
    pieces, length = [], 0
    while True:
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                message = await receive()
        except TimeoutError:
            raise errors.RequestTimeout from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        length += len(pieces[-1])
        if length > limit:
            raise errors.BodyTooLarge(limit)
        if not message.get("more_body", False):
            return b"".join(pieces)
