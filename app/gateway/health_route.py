"""``GET /health`` (whether this ingress can serve) and ``GET /livez`` (whether it runs)."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.gateway.client_address import HeaderLines, may_come_from
from app.gateway.handler import authorization_of
from app.gateway.health import Signs, judge
from app.gateway.services import Services
from app.supervision import PROCESS

_FRESH = {"cache-control": "no-store"}


def add_health_routes(api: FastAPI, prefix: str, services: Services) -> None:
    """Add both routes. Neither requires a key or a known host, or waits for anything."""

    @api.get(f"{prefix}/health")
    async def health(request: Request) -> Response:
        signs = read_signs(services, time.monotonic())
        result = judge(signs)
        body: dict[str, Any] = {
            "status": result.status.value,
            "reasons": [reason.value for reason in result.reasons],
            "model_states": {state.value: count for state, count in signs.models.items()},
        }
        if _may_see_models(services, request.scope["headers"]):
            body["models"] = {model.id: model.state.value for model in services.registry.models()}
        return JSONResponse(body, result.code, headers=_FRESH)

    @api.get(f"{prefix}/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "alive"}, headers=_FRESH)


def read_signs(services: Services, now: float) -> Signs:
    """Return the state of an ingress at the monotonic time ``now``, in seconds."""
    accounts, budgets, ledger = services.access, services.budgets, services.ledger
    return Signs(
        started=services.ready.is_set(),
        draining=services.draining,
        keys_read=accounts is None or accounts.keys_read,
        keys_away=accounts is not None and accounts.keys_away,
        unreadable_keys=0 if accounts is None else accounts.unreadable_keys,
        limits_away=accounts is not None and accounts.limits_away,
        budgets_away=budgets is not None and budgets.away,
        budgets_unread=0 if budgets is None else budgets.unread,
        has_room=ledger is None or ledger.has_room,
        store_away_s=0.0 if ledger is None else ledger.store_away_s(now),
        journals_set_aside=0 if ledger is None else ledger.journals_set_aside,
        journals_failing=0 if ledger is None else ledger.journals_failing,
        failures=len(PROCESS.recent(now)),
        models=Counter(model.state for model in services.registry.models()),
    )


def _may_see_models(services: Services, lines: HeaderLines) -> bool:
    """Return whether ``GET /v1/models`` would list the models for this request."""
    headers = dict(lines)
    if not services.ready.is_set() or not services.settings.host_rule.allows(headers):
        return False
    if services.access is None:
        return True
    caller = services.access.known_caller(authorization_of(headers))
    return caller is not None and may_come_from(services, caller, lines)
