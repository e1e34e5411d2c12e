"""``/`` (all models as cards) and ``/models/{id}`` (one model, with a playground)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from markupsafe import Markup
from starlette.routing import Route

from app.contracts.status import ModelSnapshot
from app.core import errors
from app.gateway.services import Services
from app.tenants.access import Caller
from app.web.model_view import ModelView
from app.web.pages import add_page, render, render_part
from app.web.ready_requests import ready_requests
from app.web.speed_reader import SpeedReader
from app.web.visitors import visitor


def add_model_pages(api: FastAPI, services: Services) -> None:
    """Add the pages, and the parts of them that a page loads anew every few seconds."""
    pages = _ModelPages(services)
    add_page(api, "/", pages.all)
    add_page(api, "/models/{name:path}", pages.one)
    api.router.routes.append(Route("/live/models", pages.all_live, methods=["GET"]))
    api.router.routes.append(Route("/live/models/{name:path}", pages.one_live, methods=["GET"]))


class _Cards:
    """The cards of models, each made once for a snapshot: readers load them every few seconds."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[ModelSnapshot, Markup]] = {}

    async def of(self, snapshots: Sequence[ModelSnapshot], caller: Caller) -> list[Markup]:
        """Return the cards of those models that a caller sees."""
        made = {}
        for snapshot in snapshots:
            kept = self._made.get(snapshot.id)
            if kept is None or kept[0] is not snapshot:
                kept = snapshot, render_part("parts/card.html", model=ModelView.of(snapshot))
                # A card takes 0.2 ms, and tokens of others wait meanwhile.
                await asyncio.sleep(0)
            made[snapshot.id] = kept
        self._made = made
        return [card for model_id, (_, card) in made.items() if caller.sees(model_id)]


class _ModelPages:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._speeds = SpeedReader(services.registry)
        self._cards = _Cards()

    async def all(self, request: Request) -> Response:
        return await self._all(request, "models.html")

    async def all_live(self, request: Request) -> Response:
        return await self._all(request, "parts/live_cards.html")

    async def one(self, request: Request) -> Response:
        return await self._one(request, "model.html")

    async def one_live(self, request: Request) -> Response:
        return await self._one(request, "parts/live.html")

    async def _all(self, request: Request, template: str) -> Response:
        caller = await visitor(self._services, request)
        cards = await self._cards.of(self._services.registry.models(), caller)
        return render(template, here="/", cards=cards, origin=_origin(request))

    async def _one(self, request: Request, template: str) -> Response:
        services = self._services
        caller, name = await visitor(services, request), request.path_params["name"]
        snapshot = services.registry.require(name).snapshot
        if not caller.sees(snapshot.id):
            # Also if it sees an adapter of the model: the page is the model's.
            raise errors.ModelNotFound(name)
        model = ModelView.of(snapshot)
        return render(
            template,
            here="/",
            model=model,
            speeds=await self._speeds.read(snapshot.id),
            origin=_origin(request),
            requests=ready_requests(snapshot.id, chats=model.chats),
            keys=services.access is not None,
        )


def _origin(request: Request) -> str:
    """Return the server's address as the client named it; the page corrects the scheme."""
    return f"{request.url.scheme}://{request.url.netloc}"
