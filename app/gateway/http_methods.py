"""What an ingress does with HEAD, and with clients that want a WebSocket."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from app.core.errors import WebSocketRefused
from app.gateway.request_body import Receive, Scope
from app.gateway.response import Send

_DENIAL = "websocket.http.response"


ASKED_HEAD: Final = "frontline.head"
"""In the scope of a GET that was HEAD: an answer without an end need not begin."""


def as_get(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """Return the scope and the sender with which a HEAD request is answered as GET, bodiless."""
    ended = False

    async def send_head(message: MutableMapping[str, Any]) -> None:
        nonlocal ended
        if ended:
            return
        if message["type"] == "http.response.body":
            ended = True
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    return {**scope, "method": "GET", ASKED_HEAD: True}, send_head


def wants_websocket(scope: Scope) -> bool:
    """Return whether a client asks for a WebSocket.

    A server with a WebSocket library gives the request another type; others pass it on as HTTP.
    """
    if scope["type"] == "websocket":
        return True
    for name, value in scope["headers"]:
        if name == b"upgrade" and value.lower() == b"websocket":
            return True
    return False


async def refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request for a WebSocket with 426."""
    kind = "http"
    if scope["type"] == "websocket":
        if _DENIAL not in scope.get("extensions", {}):
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        kind = "websocket.http"
        await receive()
    error = WebSocketRefused(scope["path"])
    body = error.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": f"{kind}.response.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body})
