"""Loaded by vLLM's API server into itself, as a middleware (``--middleware``).

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

It asks for the key on every route, which vLLM's own ``--api-key`` does not, and tells on
``GET /frontline/facts`` what the running engine has in force: its configuration as it stands
after every flag, file and default, not what it was asked to have.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

FACTS_PATH = "/frontline/facts"


class Guard:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._expected = b"Bearer " + os.environ["FRONTLINE_ENGINE_KEY"].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not self._has_key(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await _answer(send, 401, {"error": {"message": "The engine's key is missing."}})
        elif scope["path"] == FACTS_PATH:
            await _answer(send, 200, _facts(scope["app"]))
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                return hmac.compare_digest(bytes(value), self._expected)
        return False


def _facts(app: Any) -> dict[str, Any]:
    import vllm

    # Anything that is not found is told as null, and a null is never taken for a capability.
    config = getattr(app.state, "vllm_config", None)
    scheduler = getattr(config, "scheduler_config", None)
    model = getattr(config, "model_config", None)
    policy = getattr(scheduler, "policy", None)
    return {
        "version": vllm.__version__,
        "scheduling_policy": getattr(policy, "value", policy),
        "max_num_seqs": getattr(scheduler, "max_num_seqs", None),
        "max_model_len": getattr(model, "max_model_len", None),
    }


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(payload)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
