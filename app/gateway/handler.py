"""Handles an inference request over HTTP: identifies the caller, reads the body, answers it."""

from __future__ import annotations

import asyncio

from app.core import errors
from app.core.dialect import Route
from app.gateway import cross_site
from app.gateway.lifecycle import Lifecycle
from app.gateway.request_body import ClientGone, Headers, Receive, Scope
from app.gateway.response import Reply, Send
from app.gateway.services import Services
from app.protocol.stream import error_event
from app.tenants.access import NOBODY, Caller

__all__ = ["Handler", "Receive", "Scope", "identify"]


class Handler:
    """The ASGI application of one inference route."""

    def __init__(self, route: Route, services: Services) -> None:
        self._route = route
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            await self._answer(scope, receive, reply)
        except errors.ApiError as error:
            _forget_frames(error)
            if reply.started:
                # A stream that has begun, but has no event of an answer.
                await reply.write(error_event(error, self._route), more=False)
            else:
                await reply.refuse(error)
        except ClientGone:
            return
        except asyncio.CancelledError as error:
            # The task keeps a reference to the error.
            _forget_frames(error)
            raise
        except Exception:
            if not reply.started:
                await reply.refuse(errors.ServerError(code="internal_error"))
            # Serve logs it.
            raise

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        services, headers = self._services, dict(scope["headers"])
        caller = await identify(services, headers)
        cross_site.require_json(headers)
        with services.bodies.room_for(caller.tenant, services.settings) as room:
            inbound = await room.read(self._route, headers, receive)
            admission = services.registry.require(inbound.model)
            await Lifecycle(services, admission, caller, inbound, reply).run()


def _forget_frames(error: BaseException) -> None:
    """Drop the frames and the causes that an expected error refers to.

    Its traceback refers to every frame, and so to the request's body. A frame that also refers to
    the error makes a cycle. The body's memory has been given back by then, but the collector counts
    objects and not bytes: without this, hundreds of bodies may stay in memory.
    """
    left = [error]
    while left:
        one = left.pop()
        one.__traceback__ = None
        left += [came for came in (one.__context__, one.__cause__) if came is not None]
        one.__context__ = one.__cause__ = None


async def identify(services: Services, headers: Headers) -> Caller:
    """Return the caller of a request, before its body is read. Waits until this ingress is ready.

    Raises:
        HostNotAllowed: the request names a host that is not served here.
        InvalidKey: keys are required, and the request has none that works.
    """
    if not services.ready.is_set():
        await services.ready.wait()
    services.settings.host_rule.require(headers)
    if services.access is None:
        return NOBODY
    authorization = headers.get(b"authorization")
    text = None if authorization is None else authorization.decode("latin-1")
    return await services.access.identify(text)
