"""``GET /v1/models``: the models list, with tiers, prices and states."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.contracts.status import ModelSnapshot
from app.core.tiers import Tier
from app.gateway.handler import identify
from app.gateway.services import Services


def add_model_routes(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the list and the route of each model, by id or alias."""

    @api.get(f"{prefix}/models")
    async def list_models(request: Request) -> Response:
        await identify(services, dict(request.scope["headers"]))
        models = services.registry.models()
        return JSONResponse({"object": "list", "data": [model_entry(model) for model in models]})

    @api.get(f"{prefix}/models/{{name:path}}")
    async def show_model(request: Request, name: str) -> Response:
        await identify(services, dict(request.scope["headers"]))
        return JSONResponse(model_entry(services.registry.require(name).snapshot))


def model_entry(snapshot: ModelSnapshot) -> dict[str, Any]:
    """Return a model's entry in the models list.

    ``metadata`` follows DeepInfra's models list (``tags``, ``context_length``, ``pricing`` with
    ``input_tokens``, ``output_tokens`` and ``cache_read_tokens`` in USD for a million tokens),
    with the prices by tier. ``service_tiers`` follows Telnyx's list. ``state`` (``Availability``)
    and ``preempts`` (whether priority takes the slots of running requests) are Frontline's own.
    """
    served = snapshot.service_tiers
    return {
        "id": snapshot.id,
        "object": "model",
        "created": snapshot.created,
        "owned_by": snapshot.owned_by,
        "service_tiers": [tier.value for tier in served],
        "metadata": {
            "tags": _tags(snapshot),
            "context_length": snapshot.context_length,
            "engines": list(snapshot.engines),
            "preempts": snapshot.preempts,
            "state": snapshot.state.value,
            "aliases": list(snapshot.aliases),
            "pricing": _pricing(snapshot),
        },
    }


def _tags(snapshot: ModelSnapshot) -> list[str]:
    tags = [tier.value for tier in snapshot.service_tiers if tier is not Tier.DEFAULT]
    if any(replica.dialect.simulated for replica in snapshot.replicas):
        tags.append("simulated")
    return tags


def _pricing(snapshot: ModelSnapshot) -> dict[str, Any]:
    card, offer = snapshot.settings.rate_card, snapshot.settings.tiers.offer
    # While no replica is ready, show the prices of all offered tiers.
    shown = snapshot.service_tiers or [tier for tier in Tier if offer.offers(tier)]
    return {
        tier.value: {
            "input_tokens": float(card.by_tier[tier]["input"]),
            "output_tokens": float(card.by_tier[tier]["output"]),
            "cache_read_tokens": float(card.by_tier[tier]["cached_input"]),
        }
        for tier in shown
    }
