"""The OpenAI-compatible ingress: its routes and its Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from sqlalchemy import Engine
from starlette.exceptions import HTTPException
from starlette.routing import Route as HttpRoute

from app import supervision
from app.config.ingress import LONGEST_STOP_S, IngressSettings
from app.core import errors
from app.core.dialect import Route
from app.core.settings import Problem, SettingsError
from app.gateway.gc_tuning import settle_in
from app.gateway.handler import Handler, Receive, Scope, identify
from app.gateway.health_route import add_health_routes
from app.gateway.lifecycle import Services
from app.gateway.registry import ModelRegistry, ServeSource, model_entry, serve_host
from app.gateway.response import Send
from app.gateway.usage_reader import UsageReader
from app.gateway.usage_route import add_usage_route
from app.ledger.ledger import open_ledger
from app.ray_compat.serve_port import keep_on_loopback
from app.store.database import connect
from app.store.database_url import resolve_url
from app.tenants import deployment
from app.tenants.access import Access
from app.tenants.deployment import ServeLimits
from app.tenants.key_store import KeyStore
from app.upstream.client import EngineClient

PREFIXES = ("/v1", "/v1/openai")
"""Every route is served below both; the second is the base URL of DeepInfra's API."""
# Longer than a Model's first answer takes on a busy machine; one that is away must not hold up the
# others for ever.
_KNOWN_WITHIN_S = 15.0


class Ingress:
    """The data plane: takes requests in, passes them to engines, and stamps the answers."""

    def __init__(self, limits: Any) -> None:
        keep_on_loopback()
        settings = IngressSettings()
        catalog = ModelRegistry(ServeSource(), discover_s=settings.catalog_interval_s)
        self._services = Services(catalog, EngineClient(), settings)
        self._limits = ServeLimits(limits)
        self._store: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        catalog.start()

    # Not a plain function: those Serve calls on a thread, and the ledger belongs to the event loop.
    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over changed settings; requests under way keep those they began with.

        Raises:
            SettingsError: ``user_config`` has an unknown key or a bad value, or lets everybody in
                from a network without saying so twice.
            OSError: the journal's folder cannot be written.
        """
        settings = IngressSettings.load(user_config, "user_config")
        settings.check_open(await serve_host(), "user_config")
        before, self._services.settings = self._services.settings, settings
        old, new_store = self._store, self._store is None or settings.ledger != before.ledger
        if self._store is None or new_store:
            self._store = connect(resolve_url(settings.ledger.get_secret_value()))
        if new_store or settings.journal != before.journal:
            self._open_ledger(self._store, settings)
        if new_store or settings.usage != before.usage:
            self._open_usage(settings)
        if new_store or settings.auth != before.auth:
            self._open_accounts(self._store, settings)
        if new_store and old is not None:
            self._retire("store disposal", partial(self._dispose, old))
        self._services.catalog.set_interval(settings.catalog_interval_s)
        if not self._services.ready.is_set():
            await self._services.catalog.wait_known(_KNOWN_WITHIN_S)
            settle_in()
            self._services.ready.set()

    def _open_ledger(self, store: Engine, settings: IngressSettings) -> None:
        old = self._services.ledger
        self._services.ledger = open_ledger(store, settings.journal)
        if old is not None:
            self._retire("ledger retirement", old.retire)

    def _open_usage(self, settings: IngressSettings) -> None:
        old = self._services.usage
        url = resolve_url(settings.ledger.get_secret_value())
        self._services.usage = UsageReader(url, settings.usage)
        if old is not None:
            self._retire("usage reader", partial(asyncio.to_thread, old.close))

    def _open_accounts(self, store: Engine, settings: IngressSettings) -> None:
        old, self._services.accounts = self._services.accounts, None
        if settings.auth == "keys":
            catalog = self._services.catalog
            self._services.accounts = Access(
                catalog.ingress, KeyStore(store), self._limits, lambda: catalog.ingresses
            )
            self._services.accounts.start()
        if old is not None:
            self._retire("accounts stop", old.stop)

    def _retire(self, name: str, end: Callable[[], Awaitable[None]]) -> None:
        """Let something come to its end that requests under way may still use."""
        task = supervision.run_once(name, end)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _dispose(self, store: Engine) -> None:
        """Close a store's connections, once those are gone who use it."""
        users = self._retiring - {asyncio.current_task()}
        await asyncio.gather(*users, return_exceptions=True)
        store.dispose()

    def __serve_build_asgi_app__(self) -> Front:
        return build_api(self._services)

    async def __del__(self) -> None:
        self._services.draining = True
        await self._services.catalog.stop()
        await self._services.engines.close()
        if self._services.ledger is not None:
            await self._services.ledger.close()
        if self._services.accounts is not None:
            await self._services.accounts.stop()
        if self._services.usage is not None:
            await asyncio.to_thread(self._services.usage.close)
        await asyncio.gather(*self._retiring)
        if self._store is not None:
            self._store.dispose()


_deployment = serve.deployment(
    name="Ingress",
    # Requests never wait in Serve's own queue, which knows no tiers.
    max_ongoing_requests=100_000,
    # Serve sees that one has died when it checks it.
    health_check_period_s=2.0,
    # Serve would cut what has not ended twenty seconds after an ingress was told to stop.
    graceful_shutdown_timeout_s=LONGEST_STOP_S,
    # Where the last one must go for a new one to come, nobody would be served meanwhile.
    max_surge_percent=100,
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
    return _deployment.bind(deployment.deployment.bind())


class Front:
    """The HTTP application: what engines answer at once, everything else by FastAPI.

    FastAPI takes a request through a dozen layers before it finds its route.

    Attributes:
        routes: none that Serve could look through for every request, to name it in its metrics.
    """

    routes: tuple[()] = ()

    def __init__(self, services: Services) -> None:
        self._exchanges = {
            f"{prefix}/{route.value}": Handler(route, services)
            for prefix in PREFIXES
            for route in Route
        }
        self._api = _others(services, self._exchanges)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            exchange = self._exchanges.get(scope["path"])
            if exchange is not None:
                await exchange(scope, receive, send)
                return
        await self._api(scope, receive, send)


def build_api(services: Services) -> Front:
    """Return the HTTP application that serves every route."""
    return Front(services)


def _others(services: Services, exchanges: Mapping[str, Handler]) -> FastAPI:
    # FastAPI's own documentation routes describe types that Frontline deliberately leaves open.
    api = FastAPI(
        title="Frontline", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    # They are here as well for other methods, and for a root path.
    for path, exchange in exchanges.items():
        api.router.routes.append(HttpRoute(path, exchange, methods=["POST"]))
    for prefix in PREFIXES:
        _add_catalog_routes(api, prefix, services)
        add_usage_route(api, prefix, services)
        # Probes look for it at the root, whatever the API's version.
        add_health_routes(api, "" if prefix == PREFIXES[0] else prefix, services)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(errors.ApiError, _answer_api_error)
    api.add_exception_handler(Exception, _answer_failure)
    return api


def _add_catalog_routes(api: FastAPI, prefix: str, services: Services) -> None:
    catalog = services.catalog

    @api.get(f"{prefix}/models")
    async def list_models(request: Request) -> Response:
        await identify(services, dict(request.scope["headers"]))
        return _json({"object": "list", "data": [model_entry(m) for m in catalog.models()]})

    @api.get(f"{prefix}/models/{{name:path}}")
    async def show_model(request: Request, name: str) -> Response:
        await identify(services, dict(request.scope["headers"]))
        return _json(model_entry(catalog.require(name).snapshot))


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
