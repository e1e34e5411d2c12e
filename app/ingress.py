"""The OpenAI-compatible ingress: its routes and its Serve deployment."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.routing import Route as HttpRoute

from app import errors
from app.catalog import Catalog, ServeSource, model_entry
from app.config import IngressSettings
from app.dialect import Route
from app.exchange import Exchange
from app.ledger.ledger import open_ledger
from app.passage import Services
from app.relay import EngineClient
from app.settings import Problem, SettingsError

PREFIXES = ("/v1", "/v1/openai")
"""Every route is served below both; the second is the base URL of DeepInfra's API."""


class Ingress:
    """The data plane: takes requests in, passes them to engines, and stamps the answers."""

    def __init__(self) -> None:
        settings = IngressSettings()
        catalog = Catalog(ServeSource(), discover_s=settings.catalog_interval_s)
        self._services = Services(catalog, EngineClient(), settings)
        self._retiring: list[asyncio.Task[None]] = []
        catalog.start()

    # Not a plain function: those Serve calls on a thread, and the ledger belongs to the event loop.
    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over changed settings; requests under way keep those they began with.

        Raises:
            SettingsError: ``user_config`` has an unknown key or a bad value.
            OSError: the journal's folder cannot be written.
        """
        settings = IngressSettings.load(user_config, "user_config")
        before, ledger = self._services.settings, self._services.ledger
        if ledger is None or (settings.ledger, settings.journal) != (before.ledger, before.journal):
            self._services.ledger = open_ledger(
                settings.ledger.get_secret_value(), settings.journal
            )
            if ledger is not None:
                self._retiring.append(asyncio.create_task(ledger.retire()))
        self._services.settings = settings
        self._services.catalog.set_interval(settings.catalog_interval_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._services)

    async def __del__(self) -> None:
        await self._services.catalog.stop()
        await self._services.engines.close()
        if self._services.ledger is not None:
            await self._services.ledger.close()
        await asyncio.gather(*self._retiring)


_deployment = serve.deployment(
    name="Ingress",
    # Requests never wait in Serve's own queue, which knows no tiers.
    max_ongoing_requests=100_000,
    # Serve passes settings on only where there are some.
    user_config={},
)(serve.ingress()(Ingress))


def build(args: dict[str, Any]) -> serve.Application:
    """Return the ingress application; the ``import_path`` in a Serve config file.

    Raises:
        SettingsError: ``args`` is not empty; the ingress is set by ``user_config``.
    """
    if args:
        raise SettingsError(
            *(Problem(("args", key), "the ingress is set by user_config") for key in args)
        )
    return _deployment.bind()


def build_api(services: Services) -> FastAPI:
    """Return the HTTP application that serves every route."""
    # FastAPI's own documentation routes describe types that Frontline deliberately leaves open.
    api = FastAPI(
        title="Frontline", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    for prefix in PREFIXES:
        for route in Route:
            api.router.routes.append(
                HttpRoute(f"{prefix}/{route.value}", Exchange(route, services), methods=["POST"])
            )
        _add_catalog_routes(api, prefix, services.catalog)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(errors.ApiError, _answer_api_error)
    api.add_exception_handler(Exception, _answer_failure)
    return api


def _add_catalog_routes(api: FastAPI, prefix: str, catalog: Catalog) -> None:
    @api.get(f"{prefix}/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [model_entry(m) for m in catalog.models()]})

    @api.get(f"{prefix}/models/{{name:path}}")
    async def show_model(name: str) -> Response:
        admission = catalog.find(name)
        if admission is None:
            raise errors.ModelNotFound(name)
        return _json(model_entry(admission.snapshot))

    @api.get(f"{prefix}/health" if prefix != PREFIXES[0] else "/health")
    async def health() -> Response:
        states = {m.id: "ready" if m.replicas else "starting" for m in catalog.models()}
        return _json({"status": "ok", "models": states})


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(body, status, headers=headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return await _answer_api_error(request, errors.MethodNotAllowed(method, path, allowed))
    return await _answer_api_error(request, errors.UnknownUrl(method, path))


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ApiError)
    return _json(error.to_dict(), error.status, error.headers)


async def _answer_failure(_: Request, error: Exception) -> Response:
    failure = errors.ServerError(code="internal_error")
    return _json(failure.to_dict(), failure.status)
