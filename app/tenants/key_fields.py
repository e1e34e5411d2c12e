"""Keys from the fields that an operator gives, on the command line or over HTTP. Pure.

The fields of both are read here, so that both have the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from app.core.addresses import Network, parse_network
from app.core.dialect import Route
from app.core.tiers import Tier
from app.tenants.keys import ApiKey, KeyLimits, check_name, create_key
from app.tenants.scope import KeyScope

MAX_RPM: Final = 2**31 - 1
"""Largest limit on requests: what the database's column holds."""
MAX_TPM: Final = 2**63 - 1
"""Largest limit on tokens, likewise."""
_LONGEST_SHARE: Final = 30


class KeyFieldError(ValueError):
    """A field of a key is wrong.

    Attributes:
        field: its name.
        message: what is wrong with it, as the end of a sentence.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def new_key(fields: Mapping[str, Any], created: datetime) -> tuple[ApiKey, str]:
    """Return a new key with these fields, and the text that its owner sends.

    Fields are those of ``FIELDS``. One that is ``None`` counts as absent; only ``tenant`` is
    required.

    Raises:
        KeyFieldError: a field is wrong, or there is none of that name.
    """
    for name in fields:
        _require_known(name)
    values = {name: _parse(name, value) for name, value in fields.items() if value is not None}
    if "tenant" not in values:
        raise KeyFieldError("tenant", "a key has a tenant")
    own = _some(values, _OF_KEY)
    limits, scope = KeyLimits(**_some(values, _OF_LIMITS)), KeyScope(**_some(values, _OF_SCOPE))
    budgets = values.get("budgets", ())
    _check_default(own.get("default_tier", Tier.DEFAULT), own.get("tiers", frozenset(Tier)))
    try:
        return create_key(
            values["tenant"], limits=limits, scope=scope, admin=values.get("admin", False),
            budgets=budgets, created=created, **own,
        )  # fmt: skip
    except ValueError as error:
        # Everything else has been checked.
        raise KeyFieldError("budgets", str(error).removeprefix("budgets: ")) from None


def changed_key(key: ApiKey, fields: Mapping[str, Any]) -> ApiKey:
    """Return a key with other values in these fields, which are those of ``CHANGEABLE``.

    ``None`` removes a limit, an expiry, or a bound on models, routes and addresses.

    Raises:
        KeyFieldError: a field is wrong, or cannot be changed.
    """
    for name in fields:
        if name in FIELDS and name not in CHANGEABLE:
            raise KeyFieldError(name, "cannot be changed")
    values = {
        name: None if value is None and name in _REMOVABLE else _parse(name, value)
        for name, value in fields.items()
    }
    own = _some(values, _OF_KEY)
    _check_default(own.get("default_tier", key.default_tier), own.get("tiers", key.tiers))
    return replace(
        key,
        limits=replace(key.limits, **_some(values, _OF_LIMITS)),
        scope=replace(key.scope, **_some(values, _OF_SCOPE)),
        **own,
    )


def _some(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the values of these fields that are given, by the names that they have in a key."""
    return {_NAMES.get(name, name): values[name] for name in names if name in values}


def _require_known(name: str) -> None:
    if name not in FIELDS:
        raise KeyFieldError(name[:100], "there is no such field")


def _parse(name: str, value: Any) -> Any:
    _require_known(name)
    try:
        return FIELDS[name](value)
    except ValueError as error:
        raise KeyFieldError(name, str(error).removeprefix(f"{name}: ")) from None


def _check_default(default: Tier, tiers: frozenset[Tier]) -> None:
    if default not in tiers | {Tier.DEFAULT}:
        raise KeyFieldError("default_tier", "the default tier of a key must be among its tiers")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a text")
    check_name(value)
    return value


def _tenant(value: Any) -> str:
    if value == "":
        raise ValueError("a key has a tenant")
    return _text(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("expected a list of texts")
    return value


def _tier(value: Any) -> Tier:
    try:
        return Tier(value)
    except ValueError:
        raise ValueError(f"expected one of {', '.join(Tier)}") from None


def _tiers(value: Any) -> frozenset[Tier]:
    try:
        return frozenset(map(Tier, _texts(value))) | {Tier.DEFAULT}
    except ValueError:
        raise ValueError(f"expected some of {', '.join(Tier)}") from None


def _models(value: Any) -> frozenset[str]:
    models = frozenset(_texts(value))
    KeyScope(models=models)
    return models


def _routes(value: Any) -> frozenset[Route]:
    try:
        routes = frozenset(map(Route, _texts(value)))
    except ValueError:
        raise ValueError(f"expected some of {', '.join(Route)}") from None
    KeyScope(routes=routes)
    return routes


def _addresses(value: Any) -> frozenset[Network]:
    networks = frozenset(map(parse_network, _texts(value)))
    KeyScope(addresses=networks)
    return networks


def _whole(most: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"expected a whole number from 1 to {most}")
        return value

    return parse


def _share(value: Any) -> Decimal:
    message = "expected a number from 0 to 1"
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        raise ValueError(message)
    try:
        share = Decimal(str(value)[: _LONGEST_SHARE + 1])
    except InvalidOperation:
        raise ValueError(message) from None
    if len(str(value)) > _LONGEST_SHARE or not share.is_finite() or not 0 <= share <= 1:
        raise ValueError(message)
    return share


def _moment(value: Any) -> datetime:
    message = "expected a time in Unix seconds"
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(message)
    try:
        return datetime.fromtimestamp(value, UTC)
    except (OverflowError, ValueError, OSError):
        raise ValueError(message) from None


FIELDS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "tenant": _tenant,
    "name": _text,
    "admin": _flag,
    "default_tier": _tier,
    "tiers": _tiers,
    "rpm": _whole(MAX_RPM),
    "tpm": _whole(MAX_TPM),
    "priority_share": _share,
    "in_flight": _whole(MAX_RPM),
    "models": _models,
    "routes": _routes,
    "addresses": _addresses,
    "budgets": _texts,
    "expires_at": _moment,
}
"""What reads each field: texts, numbers, lists of texts; ``expires_at`` is in Unix seconds."""
_NAMES: Final = {"expires_at": "expires"}
_OF_KEY: Final = ("name", "default_tier", "tiers", "expires_at")
_OF_LIMITS: Final = ("rpm", "tpm", "priority_share", "in_flight")
_OF_SCOPE: Final = ("models", "routes", "addresses")
_REMOVABLE: Final = frozenset({*_OF_LIMITS, *_OF_SCOPE, "expires_at"})
CHANGEABLE: Final = frozenset({*_OF_KEY, *_OF_LIMITS, *_OF_SCOPE})
"""The fields that can be changed later. Budgets have commands of their own, and a key's tenant is
in its records."""
