"""``/board``: all models now and in the past hour, and ``/board/events``, which keeps it so."""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.routing import Route

from app.core import errors
from app.gateway.cross_site import refuse_other_sites
from app.gateway.http_methods import ASKED_HEAD
from app.gateway.services import Services
from app.web.event_stream import EventStream
from app.web.feed import BoardFeed
from app.web.pages import add_page, render
from app.web.visitors import admin, still_admin

_PATH: Final = "/board"


def add_board_routes(api: FastAPI, services: Services) -> None:
    """Add the page and its events. Where keys are required, both need an admin key."""
    feed = BoardFeed(services.registry)

    async def show(request: Request) -> Response:
        try:
            await admin(services, request)
        except errors.InvalidKey:
            return RedirectResponse(f"/login?next={_PATH}", 303, {"cache-control": "no-store"})
        return render("board.html", here=_PATH, signed_in=services.access is not None)

    async def events(request: Request) -> Response:
        lines = request.scope["headers"]
        refuse_other_sites(dict(lines))
        caller = await admin(services, request)
        if ASKED_HEAD in request.scope:
            return Response(media_type=EventStream.media_type)
        viewer = feed.join()
        return EventStream(
            viewer.events(),
            lambda: not services.draining and still_admin(services, caller, lines),
            lambda: feed.leave(viewer),
        )

    add_page(api, _PATH, show)
    api.router.routes.append(Route(f"{_PATH}/events", events, methods=["GET"]))
