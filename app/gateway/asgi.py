"""The HTTP application of an ingress: all routes, and errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route as HttpRoute

from app.core import errors
from app.core.dialect import Route
from app.gateway.handler import Handler, Receive, Scope
from app.gateway.health_route import add_health_routes
from app.gateway.models_route import add_model_routes
from app.gateway.response import Send
from app.gateway.services import Services
from app.gateway.usage_route import add_usage_route

PREFIXES = ("/v1", "/v1/openai")
"""Every route is served under both prefixes; the second is the path of DeepInfra's API."""


class Front:
    """The HTTP application: dispatches inference requests itself, and all others to FastAPI.

    FastAPI would pass every inference request through a dozen layers before it finds the route.

    Attributes:
        routes: empty, so that Serve does not search the routes for each request to label its
            metrics.
    """

    routes: tuple[()] = ()

    def __init__(self, services: Services) -> None:
        self._handlers = {
            f"{prefix}/{route.value}": Handler(route, services)
            for prefix in PREFIXES
            for route in Route
        }
        self._api = _others(services, self._handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            handler = self._handlers.get(scope["path"])
            if handler is not None:
                await handler(scope, receive, send)
                return
        await self._api(scope, receive, send)


def build_api(services: Services) -> Front:
    """Return the HTTP application that serves every route."""
    return Front(services)


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
        # Health probes expect the routes at the root, without the API's version.
        add_health_routes(api, "" if prefix == PREFIXES[0] else prefix, services)
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


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ApiError)
    return JSONResponse(error.to_dict(), error.status, error.headers)


async def _answer_failure(_: Request, error: Exception) -> Response:
    failure = errors.ServerError(code="internal_error")
    return JSONResponse(failure.to_dict(), failure.status)
