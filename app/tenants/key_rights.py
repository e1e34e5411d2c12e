"""Whether a key has more rights than another one. Pure."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Final

from app.core.addresses import Network
from app.tenants.budget import Budget, Owner, Period
from app.tenants.keys import ApiKey


def beyond(key: ApiKey, giver: ApiKey) -> str | None:
    """Return the first field in which a key may do more than another one, or ``None``.

    A limit counts for each key by itself. The tenant does not matter, nor what is spent or used.
    """
    return next((name for name, within in _RULES.items() if not within(key, giver)), None)


def _models(key: ApiKey, giver: ApiKey) -> bool:
    models, own = key.scope.models, giver.scope.models
    if own is None or models is None:
        return own is None
    # A star in the narrower pattern is matched by a star alone, which then matches all of its text.
    return all(any(fnmatchcase(each, pattern) for pattern in own) for each in models)


def _addresses(key: ApiKey, giver: ApiKey) -> bool:
    networks, own = key.scope.addresses, giver.scope.addresses
    if own is None or networks is None:
        return own is None
    return all(any(_is_part(each, network) for network in own) for each in networks)


def _is_part(part: Network, whole: Network) -> bool:
    # Two networks of one version are apart, or one contains the other.
    return part.prefixlen >= whole.prefixlen and part.network_address in whole


def _routes(key: ApiKey, giver: ApiKey) -> bool:
    routes, own = key.scope.routes, giver.scope.routes
    return own is None or (routes is not None and routes <= own)


def _limit(name: str) -> Callable[[ApiKey, ApiKey], bool]:
    def within(key: ApiKey, giver: ApiKey) -> bool:
        limit, own = getattr(key.limits, name), getattr(giver.limits, name)
        return own is None or (limit is not None and limit <= own)

    return within


def _expires(key: ApiKey, giver: ApiKey) -> bool:
    own = giver.expires
    return own is None or (key.expires is not None and key.expires <= own)


def _budgets(key: ApiKey, giver: ApiKey) -> bool:
    budgets, own = _hard(key), _hard(giver)
    return all(
        period in budgets and budgets[period].usd <= budget.usd for period, budget in own.items()
    )


def _hard(key: ApiKey) -> dict[Period, Budget]:
    return {one.period: one for one in key.budgets if one.hard and one.owner is Owner.KEY}


_RULES: Final[dict[str, Callable[[ApiKey, ApiKey], bool]]] = {
    "models": _models,
    "routes": _routes,
    "addresses": _addresses,
    "tiers": lambda key, giver: key.tiers <= giver.tiers,
    "rpm": _limit("rpm"),
    "tpm": _limit("tpm"),
    "priority_share": _limit("priority_share"),
    "in_flight": _limit("in_flight"),
    "expires_at": _expires,
    "budgets": _budgets,
}
