"""The ingress's calls to Ray Serve: listing the models, and calling their Model actors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app.contracts.credits import Demand, Renewal
from app.contracts.news import ModelNews
from app.contracts.source import SourceAway
from app.contracts.stats import QueueReport
from app.core.names import MODEL_DEPLOYMENT
from app.ray_compat.controller import serve_controller


class ServeSource:
    """Finds models in Ray Serve and calls their Model actors (a ``ModelSource``)."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._controller: Any = None

    async def applications(self) -> set[str]:
        # `serve.status()` has this too, but it builds the whole configuration of each deployment,
        # which takes milliseconds of the ingress's event loop per deployment.
        with _away_translated():
            if self._controller is None:
                # Ray restarts it under the same handle.
                self._controller = await asyncio.to_thread(serve_controller)
            deployments = await self._controller.list_deployment_ids.remote()
        return {one.app_name for one in deployments if one.name == MODEL_DEPLOYMENT}

    async def renew(
        self, application: str, demand: Demand, report: QueueReport | None, known: str
    ) -> Renewal:
        with _away_translated():
            renewal: Renewal = await self._model(application).renew.remote(demand, report, known)
        return renewal

    async def news(self, application: str, life: str, number: int) -> ModelNews:
        with _away_translated():
            news: ModelNews = await self._model(application).news.remote(life, number)
        return news

    async def wait_for_wakeup(self, application: str, ingress: str) -> bool:
        with _away_translated():
            woken: bool = await self._model(application).wait_for_wakeup.remote(ingress)
        return woken

    def _model(self, application: str) -> Any:
        handle = self._handles.get(application)
        if handle is None:
            handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=application)
            self._handles[application] = handle
        return handle


@contextmanager
def _away_translated() -> Iterator[None]:
    """Raise SourceAway for the errors that Ray and Serve raise if a call fails."""
    try:
        yield
    # Ray's `get_actor` raises the ValueError if Serve does not run.
    except (RayError, RayServeException, ConnectionError, ValueError) as error:
        raise SourceAway(type(error).__name__) from error


class ServeHttp(NamedTuple):
    """Serve's options for HTTP.

    Attributes:
        host: the address that its proxies listen on; ``None`` for all addresses.
        request_timeout_s: the longest time for a request, in seconds; ``None`` for no limit.
    """

    host: str | None
    request_timeout_s: float | None


async def serve_http() -> ServeHttp:
    """Return Serve's options for HTTP."""
    controller = await asyncio.to_thread(serve_controller)
    options = await controller.get_http_config.remote()
    return ServeHttp(options.host, options.request_timeout_s)
