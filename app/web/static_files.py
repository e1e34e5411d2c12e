"""The files that pages load: CSS, JavaScript, pictures. They are kept in memory, compressed."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

_PREFIX: Final = "/static"
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
_FOR_EVER: Final = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file.

    Attributes:
        type: its content type.
        body: its bytes.
        zipped: the same, compressed by gzip.
        tag: its entity tag.
    """

    type: str
    body: bytes
    zipped: bytes
    tag: str


def _read() -> dict[str, StaticFile]:
    found = {}
    for one in files("app.web").joinpath("static").iterdir():
        ending = one.name.rpartition(".")[2]
        if ending in _TYPES:
            body = one.read_bytes()
            tag = f'"{_hash(body)}"'
            found[one.name] = StaticFile(_TYPES[ending], body, gzip.compress(body, mtime=0), tag)
    return found


def _hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


FILES: Final[Mapping[str, StaticFile]] = _read()
"""The files by name."""

VERSION: Final = _hash("".join(name + FILES[name].tag for name in sorted(FILES)).encode())
"""A hash of all files. It is a part of their URLs.

There is one for all of them, so that a script can import another one by a relative path.
"""


def static_url(name: str) -> str:
    """Return the URL of a file. Its content never changes under this URL."""
    assert name in FILES, f"no file {name} in app/web/static"
    return f"{_PREFIX}/{VERSION}/{name}"


def add_static_routes(api: FastAPI) -> None:
    """Add the route of the files. It requires neither a key nor a known host."""
    path = f"{_PREFIX}/{{version}}/{{name}}"
    api.router.routes.append(Route(path, _serve, methods=["GET"]))


async def _serve(request: Request) -> Response:
    file = FILES.get(request.path_params["name"])
    if file is None:
        raise HTTPException(404)
    # While ingresses are replaced, a page of the new version may ask an ingress of the old one.
    current = request.path_params["version"] == VERSION
    headers = {
        "cache-control": _FOR_EVER if current else "no-cache",
        "etag": file.tag,
        "vary": "accept-encoding",
        "x-content-type-options": "nosniff",
    }
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        return Response(file.zipped, headers=headers, media_type=file.type)
    return Response(file.body, headers=headers, media_type=file.type)
