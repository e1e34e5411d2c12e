"""``/v1/keys``: an admin key creates, lists, changes and revokes keys.

Lists and times have the shapes of OpenAI's admin API (``/v1/organization/admin_api_keys``). The
fields of a key are those of ``frontline keys``, and are read by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.core import errors
from app.core.tiers import Tier
from app.gateway.cross_site import require_json
from app.gateway.handler import identify
from app.gateway.key_admin import KeyAdmin
from app.gateway.services import Services
from app.gateway.short_body import read_short_body
from app.store.database import StoreAway
from app.tenants.budget import Owner
from app.tenants.key_fields import FIELDS, KeyFieldError
from app.tenants.keys import ApiKey
from app.tenants.scope import listed

MAX_LIMIT: Final = 100
"""Most keys on one page, as in OpenAI's lists."""
_LIMIT: Final = 20
_PARAMETERS: Final = frozenset({"limit", "after", "tenant"})
_LONGEST: Final = 64 * 1024
"""Longest body, in bytes: a hundred models of 200 characters take a third of it."""
_SECRET: Final = {"cache-control": "no-store"}


def add_keys_routes(api: FastAPI, prefix: str, services: Services) -> None:
    """Add the routes. Where no keys are required they do not exist."""

    @api.api_route(f"{prefix}/keys", methods=["GET", "POST"])
    async def keys(request: Request) -> Response:
        admin, desk = await _admin(services, request)
        with _explained():
            if request.method == "POST":
                key, text = await desk.create(admin, await _fields(request))
                return JSONResponse({**key_object(key), "value": text}, headers=_SECRET)
            return await _list(request, desk)

    @api.api_route(f"{prefix}/keys/{{key_id}}", methods=["GET", "POST", "DELETE"])
    async def one_key(request: Request, key_id: str) -> Response:
        admin, desk = await _admin(services, request)
        if not (key_id.isascii() and key_id.isalnum()):
            # The database may not even take it.
            raise errors.KeyNotFound(key_id)
        with _explained():
            if request.method == "DELETE":
                if not await desk.revoke(admin, key_id):
                    raise errors.KeyNotFound(key_id)
                return JSONResponse({"object": "key.deleted", "id": key_id, "deleted": True})
            if request.method == "POST":
                key = await desk.change(admin, key_id, await _fields(request))
            else:
                key = await desk.get(key_id)
            if key is None:
                raise errors.KeyNotFound(key_id)
            return JSONResponse(key_object(key))


async def _admin(services: Services, request: Request) -> tuple[ApiKey, KeyAdmin]:
    """Return the admin key of a request, and what reads and changes keys.

    Raises:
        HostNotAllowed, InvalidKey, AddressNotAllowed: see ``identify``.
        UnknownUrl: no keys are required here.
        AdminRequired: the key is not an admin key.
    """
    caller = await identify(services, request.scope["headers"])
    if services.key_admin is None:
        raise errors.UnknownUrl(request.method, request.url.path)
    if caller.key is None or not caller.key.admin:
        raise errors.AdminRequired("These routes read and change the keys of all tenants.")
    return caller.key, services.key_admin


@contextmanager
def _explained() -> Iterator[None]:
    """Translate what goes wrong.

    Raises:
        InvalidRequest: a field of a key is wrong.
        Unavailable: the database cannot be used.
    """
    try:
        yield
    except KeyFieldError as error:
        known = error.field in FIELDS
        raise errors.InvalidRequest(
            f"Invalid '{error.field}': {error.message}."
            if known
            else f"Unknown parameter: '{error.field}'.",
            param=error.field,
        ) from None
    except StoreAway:
        raise errors.Unavailable(
            "Keys cannot be read or changed at the moment. Those that are known go on working.",
            "keys_unavailable",
            5.0,
        ) from None


async def _fields(request: Request) -> dict[str, Any]:
    require_json(dict(request.scope["headers"]))
    body = await read_short_body(request, _LONGEST)
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise errors.InvalidRequest("The request body is not valid JSON.") from None
    if not isinstance(fields, dict):
        raise errors.InvalidRequest("The request body must be a JSON object.")
    return fields


async def _list(request: Request, desk: KeyAdmin) -> Response:
    query = request.query_params
    for name in query:
        if name not in _PARAMETERS:
            raise errors.InvalidRequest(f"Unknown parameter: '{name[:100]}'.", param=name[:100])
    limit, tenant = _limit(query), query.get("tenant")
    found, unreadable = await desk.listing()
    keys = [key for key in found if tenant is None or key.tenant == tenant]
    part, more = page(keys, limit, query.get("after"))
    ids = [key.key_id for key in part]
    return JSONResponse(
        {
            "object": "list",
            "data": [key_object(key) for key in part],
            "has_more": more,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "unreadable": [{"id": one, "error": fault} for one, fault in unreadable.items()],
        }
    )


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(_LIMIT))
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_LIMIT):
        raise errors.InvalidRequest(
            f"Invalid 'limit': expected a whole number from 1 to {MAX_LIMIT}.", param="limit"
        )
    return int(text)


def page(keys: Sequence[ApiKey], limit: int, after: str | None) -> tuple[Sequence[ApiKey], bool]:
    """Return at most so many keys after the one with an id, and whether more follow.

    Raises:
        InvalidRequest: no key has the id.
    """
    begin = 0
    if after is not None:
        places = [place for place, key in enumerate(keys) if key.key_id == after]
        if not places:
            raise errors.InvalidRequest("Invalid 'after': no key has this id.", param="after")
        begin = places[0] + 1
    return keys[begin : begin + limit], len(keys) > begin + limit


def key_object(key: ApiKey) -> dict[str, Any]:
    """Return a key without its secret. Times are in Unix seconds; ``null`` is no limit, or all."""
    limits, scope = key.limits, key.scope
    share = limits.priority_share
    return {
        "object": "key",
        "id": key.key_id,
        "tenant": key.tenant,
        "name": key.name,
        "admin": key.admin,
        "default_tier": key.default_tier.value,
        "tiers": [tier.value for tier in Tier if tier in key.tiers],
        "rpm": limits.rpm,
        "tpm": limits.tpm,
        "priority_share": None if share is None else float(share),
        "in_flight": limits.in_flight,
        "models": listed(scope.models),
        "routes": listed(scope.routes),
        "addresses": listed(scope.addresses),
        "budgets": [str(one) for one in key.budgets if one.owner is Owner.KEY],
        "created_at": _seconds(key.created),
        "expires_at": _seconds(key.expires),
        "revoked_at": _seconds(key.revoked),
    }


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
