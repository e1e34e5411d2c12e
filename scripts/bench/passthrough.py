"""A bare passage on Ray Serve: what a gateway in Python costs before it does anything of its own.

A raw ASGI application that sends each request on with aiohttp and returns what comes back as it
comes; a deployment of the same cluster, with the same settings, as Frontline's ingress.
"""

from __future__ import annotations

from typing import Any

import aiohttp
from ray import serve

_CONTENT_TYPE = b"content-type"


class Application:
    """The ASGI application."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        pieces = []
        while True:
            message = await receive()
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        headers = {"content-type": "application/json"}
        async with self._session.post(
            self._url, data=b"".join(pieces), headers=headers
        ) as response:
            kind = response.headers["content-type"].encode()
            start = {"type": "http.response.start", "status": response.status}
            await send({**start, "headers": [(_CONTENT_TYPE, kind)]})
            body: dict[str, Any] = {"type": "http.response.body"}
            if kind.startswith(b"text/event-stream"):
                async for piece in response.content.iter_any():
                    await send({**body, "body": piece, "more_body": True})
                await send({**body, "body": b""})
            else:
                await send({**body, "body": await response.read()})


class Passthrough:
    """The Serve deployment."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __serve_build_asgi_app__(self) -> Application:
        return Application(self._url)


_deployment = serve.deployment(name="Passthrough", max_ongoing_requests=100_000)(
    serve.ingress()(Passthrough)
)


def build(args: dict[str, str]) -> serve.Application:
    """Return the application; ``args`` holds the engine's ``url``."""
    return _deployment.bind(args["url"])
