"""The HTTP application of an ingress: all routes, and errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route as HttpRoute

from app.core import errors
from app.core.dialect import POOLED_ROUTES, TOKEN_ROUTES, Route
from app.gateway.cross_origin import CrossOrigin
from app.gateway.handler import Handler, Receive, Scope
from app.gateway.health_route import add_health_routes
from app.gateway.http_methods import as_get, refuse_websocket, wants_websocket
from app.gateway.keys_route import add_keys_routes
from app.gateway.me_route import add_me_route
from app.gateway.models_route import add_model_routes, is_from_anthropics_client
from app.gateway.organization_usage import add_organization_routes
from app.gateway.request_costs_route import add_request_costs_route
from app.gateway.response import Send
from app.gateway.services import Services
from app.gateway.usage_route import add_usage_route
from app.protocol import anthropic

PREFIXES: tuple[str, ...] = ("/v1", "/v1/openai")
"""Every route is served under both prefixes; the second is the path of DeepInfra's API."""
ANTHROPIC_PREFIX = "/anthropic/v1"
"""Anthropic's routes and the models list are served here, too: the path of DeepInfra's API for
Anthropic's clients."""

AddRoutes = Callable[[FastAPI, Services], None]
"""Adds further routes."""


class Front:
    """The HTTP application: dispatches inference requests itself, and all others to FastAPI.

    FastAPI would pass every inference request through a dozen layers before it finds the route.

    Attributes:
        routes: empty, so that Serve does not search the routes for each request to label its
            metrics.
    """

    routes: tuple[()] = ()

    def __init__(self, services: Services, *more: AddRoutes) -> None:
        self._handlers = {
            path: Handler(route, services) for route in Route for path in paths_of(route)
        }
        self._api = _others(services, self._handlers)
        self._services = services
        self._answer = CrossOrigin(self._dispatch, lambda: services.settings.cors_rule)
        for add_routes in more:
            add_routes(self._api, services)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (handler := self._handler(scope)) is not None and self._services.settings.cors_rule.none:
            # Nearly every request: what follows has nothing to do for it.
            await handler(scope, receive, send)
            return
        if scope["type"] == "lifespan":
            await self._api(scope, receive, send)
            return
        if wants_websocket(scope):
            await refuse_websocket(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = as_get(scope, send)
        await self._answer(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handler(scope)
        if handler is None:
            await self._api(scope, receive, send)
        else:
            await handler(scope, receive, send)

    def _handler(self, scope: Scope) -> Handler | None:
        """Return what answers an inference request; ``None`` for any other request."""
        if scope.get("method") != "POST" or scope.get("root_path"):
            return None
        return self._handlers.get(scope["path"])


def paths_of(route: Route) -> list[str]:
    """Return the paths at which a route is served."""
    prefixes = PREFIXES
    if route.is_anthropic:
        prefixes += (ANTHROPIC_PREFIX,)
    elif route in TOKEN_ROUTES | POOLED_ROUTES:
        # vLLM's own clients know them at the root.
        prefixes += ("",)
    if route is Route.RERANK:
        # Cohere's clients.
        prefixes += ("/v2",)
    return [f"{prefix}/{route.value}" for prefix in prefixes]


def build_api(services: Services, *more: AddRoutes) -> Front:
    """Return the HTTP application that serves every route of the API, and ``more`` routes."""
    return Front(services, *more)


def _others(services: Services, handlers: Mapping[str, Handler]) -> FastAPI:
    # FastAPI's own documentation routes describe types that Frontline deliberately leaves open.
    api = FastAPI(
        title="Frontline", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    # The inference routes are added here too, for other methods and for requests with a root path.
    for path, handler in handlers.items():
        api.router.routes.append(HttpRoute(path, handler, methods=["POST"]))
    for prefix in PREFIXES:
        add_model_routes(api, prefix, services)
        add_usage_route(api, prefix, services)
        add_organization_routes(api, prefix, services)
        add_me_route(api, prefix, services)
        add_request_costs_route(api, prefix, services)
        add_keys_routes(api, prefix, services)
        # Health probes expect the routes at the root, without the API's version.
        add_health_routes(api, "" if prefix == PREFIXES[0] else prefix, services)
    add_model_routes(api, ANTHROPIC_PREFIX, services, anthropics=True)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(errors.ApiError, _answer_api_error)
    api.add_exception_handler(Exception, _answer_failure)
    return api


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return await _answer_api_error(request, errors.MethodNotAllowed(method, path, allowed))
    return await _answer_api_error(request, errors.UnknownUrl(method, path))


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ApiError)
    return _error_response(request, error)


def _error_response(request: Request, error: errors.ApiError) -> Response:
    # Also for other methods on Anthropic's routes, and for routes of its API that are not served.
    by_path = request.url.path.startswith((f"{ANTHROPIC_PREFIX}/", *_ANTHROPIC_PATHS))
    anthropics = by_path or is_from_anthropics_client(request)
    body = anthropic.error_body(error) if anthropics else error.body()
    return Response(body, error.status, error.headers, "application/json")


async def _answer_failure(request: Request, error: Exception) -> Response:
    return _error_response(request, errors.ServerError(code="internal_error"))


_ANTHROPIC_PATHS = tuple(paths_of(Route.MESSAGES))
