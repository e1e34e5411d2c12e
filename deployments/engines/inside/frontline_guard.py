"""ASGI middleware inside an engine's server that rejects every request without the key.

Runs under the engine's interpreter, where Frontline is not installed: standard library only.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application around the engine's. It requires the key on every route."""

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
                await answer(send, 401, {"error": {"message": "The engine's key is missing."}})
        else:
            await self.admit(scope, receive, send)

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that has the key."""
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                return hmac.compare_digest(bytes(value), self._expected)
        return False


async def read_json(receive: Receive) -> Any:
    """Return the JSON of a request's body; ``None`` if it is none."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        return json.loads(body)
    except ValueError:
        return None


async def answer(send: Send, status: int, body: dict[str, Any]) -> None:
    """Answer with JSON."""
    payload = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(payload)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
