"""Handles an inference request over HTTP: identifies the caller, reads the body, answers it."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from app.core import errors
from app.core.dialect import Route
from app.flow.admission import Admission
from app.gateway import cross_site
from app.gateway.client_address import HeaderLines, require_address
from app.gateway.lifecycle import Lifecycle
from app.gateway.request_body import ClientGone, Headers, Receive, Scope
from app.gateway.request_watch import RequestWatch, is_not_watched
from app.gateway.response import Reply, Send
from app.gateway.services import Services
from app.observe.observers import (
    CLIENT_GONE,
    CLIENT_GONE_STATUS,
    INTERNAL_ERROR,
    Context,
    Refused,
)
from app.protocol.events import error_body, error_event
from app.protocol.images import with_images
from app.protocol.requests import Inbound, with_start_within
from app.protocol.start_within import START_WITHIN
from app.tenants.access import NOBODY, Caller

_START_WITHIN: Final = START_WITHIN.encode()

__all__ = ["Handler", "Receive", "Scope", "authorization_of", "identify", "require_admin"]


class Handler:
    """The ASGI application of one inference route."""

    def __init__(self, route: Route, services: Services) -> None:
        self._route = route
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        # Where Anthropic's SDKs look for it. `x-request-id` is the client's own or Serve's.
        reply.headers.append(("request-id", reply.request_id))
        try:
            await self._answer(scope, receive, reply)
        except errors.ApiError as error:
            _forget_frames(error)
            if reply.started:
                # A stream that has begun, but has no event of an answer.
                await reply.write(error_event(error, self._route), more=False)
            else:
                await reply.refuse(error, error_body(error, self._route, reply.request_id))
        except ClientGone:
            return
        except asyncio.CancelledError as error:
            # The task keeps a reference to the error.
            _forget_frames(error)
            raise
        except Exception:
            if not reply.started:
                failure = errors.ServerError(code="internal_error")
                await reply.refuse(failure, error_body(failure, self._route, reply.request_id))
            # Serve logs it.
            raise

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        services, headers = self._services, dict(scope["headers"])
        caller, lifecycle, began = NOBODY, None, time.monotonic()
        context = Context(headers.get(b"x-request-id", b""), services.begin_trace(headers))
        try:
            caller = await key_holder(services, headers)
            require_address(services, caller, scope["headers"])
            caller.require_route(self._route)
            self._require_type(headers)
            with services.bodies.room_for(caller.tenant, services.settings) as room:
                inbound = await room.read(self._route, headers, receive)
                inbound = with_start_within(inbound, headers.get(_START_WITHIN))
                admission = require_model(services, caller, inbound.model)
                if _prices_images(admission, inbound):
                    inbound = await services.bodies.in_turns(with_images(inbound))
                lifecycle = Lifecycle(services, admission, caller, inbound, reply, context)
                if is_not_watched(headers):
                    watch = RequestWatch(receive, reply, services.longest_request_s)
                    await _watched(lifecycle, watch)
                else:
                    await lifecycle.run()
        except BaseException as error:
            if lifecycle is None:
                self._refused(reply, caller, error, time.monotonic() - began, context)
            raise

    def _require_type(self, headers: Headers) -> None:
        """Reject a body of another type than the route's, and a form that another site sends."""
        if not self._route.is_form:
            cross_site.require_json(headers)
            return
        cross_site.require_form(headers)
        services = self._services
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        # Where a key is required, another site's page has none.
        if services.access is None and not services.settings.cors_rule.allows(origin):
            cross_site.refuse_senders(headers)

    def _refused(
        self,
        reply: Reply,
        caller: Caller,
        error: BaseException,
        duration_s: float,
        context: Context,
    ) -> None:
        """Tell observers of a request that ended before its model was known."""
        match error:
            case errors.ApiError():
                status, reason = error.status, error.code or error.type
            case ClientGone() | asyncio.CancelledError():
                status, reason = CLIENT_GONE_STATUS, CLIENT_GONE
            case _:
                status, reason = 500, INTERNAL_ERROR
        self._services.observers.refused(
            Refused(
                reply.request_id,
                self._route.value,
                caller.tenant,
                status,
                reason,
                caller.key_id,
                duration_s,
                context,
            )
        )


async def _watched(lifecycle: Lifecycle, watch: RequestWatch) -> None:
    try:
        with watch:
            await lifecycle.run()
    except asyncio.CancelledError:
        await watch.answer_cancelled()
        raise


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


async def identify(services: Services, lines: HeaderLines) -> Caller:
    """Return the caller of a request, before its body is read. Waits until this ingress is ready.

    Raises:
        HostNotAllowed: the request names a host that is not served here.
        InvalidKey: keys are required, and the request has none that works.
        AddressNotAllowed: the key may not be used from the client's address.
    """
    caller = await key_holder(services, dict(lines))
    require_address(services, caller, lines)
    return caller


async def key_holder(services: Services, headers: Headers) -> Caller:
    """Do the same as ``identify``, without the rule for addresses."""
    if not services.ready.is_set():
        await services.ready.wait()
    services.settings.host_rule.require(headers)
    if services.access is None:
        return NOBODY
    return await services.access.identify(authorization_of(headers))


def require_admin(services: Services, caller: Caller, why: str) -> None:
    """Reject a caller whose key is not an admin key; without keys, everyone is an admin.

    Args:
        why: what is asked for concerns all tenants, as a sentence.

    Raises:
        AdminRequired: the caller's key is not an admin key.
    """
    if services.access is not None and not caller.is_admin:
        raise errors.AdminRequired(why)


def require_model(services: Services, caller: Caller, name: str) -> Admission:
    """Return the model with an id or alias, or with an adapter of this name.

    Raises:
        ModelNotFound: there is none, or the caller's key may not use it. The answer is the same.
        ServiceUnavailable: no model is known yet.
    """
    admission = services.registry.require(name)
    if not caller.sees(admission.snapshot.named(name)):
        raise errors.ModelNotFound(name)
    return admission


def _prices_images(admission: Admission, inbound: Inbound) -> bool:
    """Return whether the model of a request has a price for images."""
    model = admission.snapshot
    return model.settings.rate_card_of(model.adapter(inbound.model)).prices_images


def authorization_of(headers: Headers) -> str | None:
    """Return the ``Authorization`` header, or the one that stands for a key in another header.

    Anthropic's clients send a key as ``x-api-key``, Azure's as ``api-key``. ``Authorization`` goes
    first where several are sent.
    """
    authorization = headers.get(b"authorization")
    if authorization is not None:
        return authorization.decode("latin-1")
    key = headers.get(b"x-api-key") or headers.get(b"api-key")
    return f"Bearer {key.decode('latin-1')}" if key else None
