"""``GET /v1/me``: what the caller's key may do, its limits and budgets, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.config.ingress import IngressSettings
from app.core.tiers import Tier
from app.gateway.handler import identify
from app.gateway.services import Services
from app.ledger.usage import plain
from app.tenants.access import Access, Caller
from app.tenants.budget_gate import BudgetState
from app.tenants.concurrency import Holder
from app.tenants.keys import KeyLimits
from app.tenants.scope import EVERYTHING, listed

_NO_LIMITS = KeyLimits()


def add_me_route(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the route. It counts against no limit."""

    @api.get(f"{prefix}/me")
    async def me(request: Request) -> Response:
        caller = await identify(services, request.scope["headers"])
        states = await budget_states(services, caller)
        return JSONResponse(caller_object(caller, services.settings, services.access, states))


async def budget_states(services: Services, caller: Caller) -> list[BudgetState]:
    """Return the budgets of a caller's key and tenant, with what is spent."""
    return [] if services.budgets is None else await services.budgets.states(caller.key)


def caller_object(
    caller: Caller,
    settings: IngressSettings,
    access: Access | None,
    budgets: Sequence[BudgetState] = (),
) -> dict[str, Any]:
    """Return what a caller may know of itself.

    ``limits`` are over all ingresses; ``null`` is no limit. ``models`` and ``routes`` are those
    that its key may use, ``addresses`` the networks that it may use them from; ``null`` for all.
    ``remaining`` is what the headers of an answer would say now. ``in_flight`` counts this
    ingress's requests only. ``budgets`` are those of its key and of its tenant; amounts are strings
    in USD, and ``null`` if they are not known.
    """
    key = caller.key
    limits = _NO_LIMITS if key is None else key.limits
    scope = EVERYTHING if key is None else key.scope
    tiers = frozenset(Tier) if key is None else key.tiers | {Tier.DEFAULT}
    share, bounded = limits.priority_share, access is not None and key is not None
    return {
        "object": "caller",
        "tenant": caller.tenant,
        "key": None if key is None else _key(caller),
        "default_tier": (caller.default_tier or settings.default_tier).value,
        "service_tiers": [tier.value for tier in Tier if tier in tiers],
        "models": listed(scope.models),
        "routes": listed(scope.routes),
        "addresses": listed(scope.addresses),
        "limits": {
            "requests_per_minute": limits.rpm,
            "tokens_per_minute": limits.tpm,
            "priority_share": None if share is None else float(share),
            "in_flight": _least(settings.in_flight.key, limits.in_flight) if bounded else None,
            "in_flight_of_tenant": settings.in_flight.tenant if bounded else None,
        },
        "remaining": _remaining(caller, access),
        "budgets": [_budget(state) for state in budgets],
        "in_flight": _in_flight(caller, access),
    }


def _key(caller: Caller) -> dict[str, Any]:
    assert caller.key is not None
    key = caller.key
    return {
        "id": key.key_id,
        "name": key.name,
        "created": int(key.created.timestamp()),
        "expires": None if key.expires is None else int(key.expires.timestamp()),
    }


def _budget(state: BudgetState) -> dict[str, Any]:
    budget, resets = state.budget, state.resets
    return {
        "owner": budget.owner.value,
        "period": budget.period.value,
        "mode": budget.mode,
        "limit": plain(budget.usd),
        "spent": None if state.spent is None else plain(state.spent),
        "left": None if state.left is None else plain(state.left),
        "resets": None if resets is None else int(_midnight(resets).timestamp()),
    }


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _least(bound: int, own: int | None) -> int:
    return bound if own is None else min(bound, own)


def _remaining(caller: Caller, access: Access | None) -> dict[str, int | None]:
    headers = dict(access.headers(caller)) if access is not None else {}
    left = {name: headers.get(f"x-ratelimit-remaining-{name}") for name in ("requests", "tokens")}
    return {name: None if text is None else int(text) for name, text in left.items()}


def _in_flight(caller: Caller, access: Access | None) -> dict[str, int] | None:
    if access is None:
        return None
    count = access.in_flight.of
    return {
        "key": count(Holder.KEY, caller.key_id),
        "tenant": count(Holder.TENANT, caller.tenant),
    }
