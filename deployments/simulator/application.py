"""The engine's HTTP server: an ASGI application without a framework, so that it is fast.

A load test should measure Frontline, not this server.
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Mapping
from typing import Any, Final

import orjson
from frontline_tally import telling

from app.core.dialect import Route
from app.core.settings import SettingsError
from deployments.simulator import VERSION
from deployments.simulator.engine import Engine
from deployments.simulator.exchange import JSON, HttpExchange, Receive, Scope, Send
from deployments.simulator.inference import Inference
from deployments.simulator.lora import LoraRoutes
from deployments.simulator.observations import EngineState
from deployments.simulator.requests import (
    InvalidBodyError,
    RefusedError,
    parse_json,
)
from deployments.simulator.settings import Change, DialectName
from deployments.simulator.wire import Headers, Wire
from deployments.simulator.wire_sglang import SglangWire
from deployments.simulator.wire_tensorrt_llm import TensorrtLlmWire
from deployments.simulator.wire_vllm import VllmWire

WIRES: Final[Mapping[DialectName, type[Wire]]] = {
    DialectName.VLLM: VllmWire,
    DialectName.SGLANG: SglangWire,
    DialectName.TENSORRT_LLM: TensorrtLlmWire,
}

_TEXT: Final = b"text/plain; version=0.0.4; charset=utf-8"
_ROUTES: Final = {route.path: route for route in Route}


class Application:
    """Routes requests to the engine and writes its answers in its dialect.

    Every route requires the key. (vLLM's key protects only ``/v1``.) With the setting
    ``guarded: false`` no route does, as with TensorRT-LLM's server.
    """

    def __init__(self, engine: Engine, served_name: str, model: str, key: str) -> None:
        self.engine = engine
        self.wire = WIRES[engine.settings.dialect](engine.settings, served_name, model)
        self._inference = Inference(engine, self.wire)
        self._loras = LoraRoutes(engine.settings, self.wire.adapters)
        self.ready = False
        self.child: int | None = None
        self._credentials = b"Bearer " + key.encode()
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if self.wire.tells_preemptions:
            send = telling(send)
        exchange = HttpExchange(scope, receive, send)
        if not self._admitted(exchange.headers):
            await exchange.answer(401, _unauthorized())
            return
        route = _ROUTES.get(exchange.path)
        if route is None or route not in self.wire.routes:
            await self._side_route(exchange, scope["method"])
        elif scope["method"] == "POST":
            await self._inference.serve(exchange, route)
        else:
            words = "Method Not Allowed"
            await self._inference.refuse(exchange, RefusedError(405, words, words))

    def _admitted(self, headers: Headers) -> bool:
        if not self.engine.settings.guarded:
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._credentials)

    async def _side_route(self, exchange: HttpExchange, method: str) -> None:
        path = exchange.path
        if path == "/simulate":
            await self._simulate(exchange, method)
        elif method == "POST" and path in self._loras:
            await self._change_adapters(exchange)
        elif method != "GET":
            await self._inference.refuse(exchange, RefusedError(404, "Not Found", "Not Found"))
        elif path in ("/health", "/ready"):  # /ready is SGLang's; here all dialects have it
            if self.engine.settings.failures.health_hangs:
                await exchange.gone()
            await exchange.answer(200 if self.ready else 503)
        elif path == "/version":
            await exchange.answer(200, orjson.dumps({"version": VERSION}))
        elif path == "/v1/models":
            models = {"object": "list", "data": self.wire.model_cards(self._created)}
            await exchange.answer(200, orjson.dumps(models))
        elif (metrics := self.metrics().get(path)) is not None:
            await exchange.answer(200, metrics, JSON if metrics.startswith(b"[") else _TEXT)
        else:
            await self._inference.refuse(exchange, RefusedError(404, "Not Found", "Not Found"))

    def metrics(self) -> Mapping[str, bytes]:
        """Return the engine's metrics, by path."""
        scheduler = self.engine.scheduler
        state = EngineState(
            scheduler.running,
            scheduler.waiting,
            scheduler.preemptions,
            scheduler.running / scheduler.slots,
            self.engine.timings,
        )
        return self.wire.metrics(state)

    async def _change_adapters(self, exchange: HttpExchange) -> None:
        try:
            body = parse_json(await exchange.body())
        except InvalidBodyError as error:
            await self._inference.refuse(exchange, RefusedError(400, str(error)))
            return
        await exchange.answer(*self._loras.answer(exchange.path, body))

    # Reports and changes for tests

    async def _simulate(self, exchange: HttpExchange, method: str) -> None:
        if method == "POST":
            try:
                body = parse_json(await exchange.body())
                self.engine.change(Change.load(body, "simulate"))
            except (InvalidBodyError, SettingsError) as error:
                await self._inference.refuse(exchange, RefusedError(400, str(error)))
                return
        await exchange.answer(200, orjson.dumps(self._report()))

    def _report(self) -> dict[str, Any]:
        engine, scheduler, seen = self.engine, self.engine.scheduler, self.engine.observations
        settings = engine.settings
        return {
            "simulated": True,
            "version": VERSION,
            "dialect": settings.dialect,
            "policy": settings.policy,
            "lower_goes_first": settings.lower_goes_first,
            "preempts": scheduler.preempts,
            "slots": scheduler.slots,
            "context_length": settings.context_length,
            "settings": settings.model_dump(mode="json"),
            "pid": os.getpid(),
            "child_pid": self.child,
            "received": seen.received,
            "aborted": seen.aborted,
            "preempted": scheduler.preemptions,
            "suspended": scheduler.suspended,
            "suspended_s": scheduler.suspended_s(time.monotonic()),
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "max_running": scheduler.max_running,
            "starts": [start._asdict() for start in scheduler.starts],
            "requests": seen.report(),
        }


def _unauthorized() -> bytes:
    error = {
        "message": "Incorrect API key provided.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    return orjson.dumps({"error": error})
