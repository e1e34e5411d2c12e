"""``GET /v1/models``: the models list, with tiers, prices and states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.contracts.status import ModelSnapshot
from app.core.tiers import Tier
from app.gateway.handler import identify, require_model
from app.gateway.services import Services


def add_model_routes(
    api: FastAPI, prefix: str, services: Services, *, anthropics: bool = False
) -> None:
    """Add the list and the route of each model, by id, alias or adapter.

    Where ``anthropics`` is set, and to clients of Anthropic's API, answers have the fields of its
    models list as well.
    """

    @api.get(f"{prefix}/models/", include_in_schema=False)
    @api.get(f"{prefix}/models")
    async def list_models(request: Request) -> Response:
        caller = await identify(services, request.scope["headers"])
        models, aliases = services.registry.models(), services.settings.list_aliases
        entries = [
            entry
            for model in models
            for entry in model_entries(model, caller.sees, aliases=aliases)
        ]
        if anthropics or is_from_anthropics_client(request):
            return JSONResponse(anthropic_list(entries))
        return JSONResponse({"object": "list", "data": entries})

    @api.get(f"{prefix}/models/{{name:path}}")
    async def show_model(request: Request, name: str) -> Response:
        caller = await identify(services, request.scope["headers"])
        snapshot = require_model(services, caller, name).snapshot
        entry = model_entry(snapshot, snapshot.adapter(name))
        if anthropics or is_from_anthropics_client(request):
            entry = anthropic_entry(entry)
        return JSONResponse(entry)


def is_from_anthropics_client(request: Request) -> bool:
    """Return whether a request, at whatever path, has the header that Anthropic's API requires."""
    return "anthropic-version" in request.headers


def anthropic_list(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the models list with the fields of Anthropic's. It is always one page."""
    ids = [entry["id"] for entry in entries] or [None]
    page = {"has_more": False, "first_id": ids[0], "last_id": ids[-1]}
    return {"object": "list", "data": [anthropic_entry(entry) for entry in entries], **page}


def anthropic_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a model's entry with the fields of Anthropic's models list."""
    return {
        **entry,
        "type": "model",
        "display_name": entry["id"],
        "created_at": datetime.fromtimestamp(entry["created"], UTC).isoformat(),
        "max_input_tokens": entry["context_length"],
    }


def model_entries(
    snapshot: ModelSnapshot, sees: Callable[[str], bool], *, aliases: bool
) -> list[dict[str, Any]]:
    """Return a model's entries in the models list, of those that the caller sees.

    They are its own, one for each alias if wanted, and one for each adapter.
    """
    entries = []
    if sees(snapshot.id):
        entry = model_entry(snapshot)
        entries = [entry, *({**entry, "id": alias} for alias in snapshot.aliases if aliases)]
    return entries + [model_entry(snapshot, name) for name in snapshot.adapters if sees(name)]


def model_entry(snapshot: ModelSnapshot, adapter: str = "") -> dict[str, Any]:
    """Return the entry of a model, or of one of its adapters, in the models list.

    ``metadata`` follows DeepInfra's models list (``tags``, ``context_length``, ``pricing`` with
    ``input_tokens``, ``output_tokens`` and ``cache_read_tokens`` in USD for a million tokens),
    with the prices by tier. ``service_tiers`` follows Telnyx's list, ``context_length``
    OpenRouter's, ``max_model_len`` and ``parent`` vLLM's and SGLang's. Frontline's own are
    ``state`` (``Availability``), ``state_reason`` (why its engines failed to start),
    ``starting`` (what engines that are starting do, by pool), and ``preempts`` (whether priority
    takes the slots of running requests).
    """
    served = snapshot.service_tiers
    return {
        "id": adapter or snapshot.id,
        "object": "model",
        "created": snapshot.created,
        "owned_by": snapshot.owned_by,
        "parent": snapshot.id if adapter else None,
        "service_tiers": [tier.value for tier in served],
        "context_length": snapshot.context_length,
        "max_model_len": snapshot.context_length,
        "metadata": {
            "tags": _tags(snapshot),
            "context_length": snapshot.context_length,
            "engines": list(snapshot.engines),
            "preempts": snapshot.preempts,
            "routes": [route.value for route in snapshot.routes_of(adapter)],
            "state": snapshot.state.value,
            "state_reason": snapshot.failure_reason,
            "starting": [asdict(start) for start in snapshot.starts.values()],
            "aliases": [] if adapter else list(snapshot.aliases),
            "pricing": _pricing(snapshot, adapter),
        },
    }


def _tags(snapshot: ModelSnapshot) -> list[str]:
    tags = [tier.value for tier in snapshot.service_tiers if tier is not Tier.DEFAULT]
    if any(replica.dialect.simulated for replica in snapshot.replicas):
        tags.append("simulated")
    return tags


def _pricing(snapshot: ModelSnapshot, adapter: str) -> dict[str, Any]:
    settings = snapshot.settings
    card, offer = settings.rate_card_of(adapter), settings.tiers.offer
    # While no replica is ready, show the prices of all offered tiers.
    shown = snapshot.service_tiers or [tier for tier in Tier if offer.offers(tier)]
    prices: dict[str, Any] = {tier.value: _per_kind(card.by_tier[tier]) for tier in shown}
    for tier in shown:
        if (long := card.long_by_tier.get(tier)) is not None:
            above, by_kind = long
            prices[tier.value]["long_context"] = {"above": above, **_per_kind(by_kind)}
    return prices


def _per_kind(prices: Mapping[str, Decimal]) -> dict[str, float]:
    shown = {
        "input_tokens": float(prices["input"]),
        "output_tokens": float(prices["output"]),
        "cache_read_tokens": float(prices["cached_input"]),
        "cache_write_tokens": float(prices["cache_write"]),
    }
    others = ("image", "audio_second")
    return shown | {kind: float(prices[kind]) for kind in others if prices[kind]}
