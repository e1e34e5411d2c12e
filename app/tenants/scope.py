"""What a key may be used for, and from where: models, routes and addresses. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from app.core.addresses import Address, Network, is_within
from app.core.dialect import Route

_PATTERN: Final = re.compile(r"[A-Za-z0-9._:/@*-]{1,200}")
MAX_PATTERNS: Final = 100
"""Most models and patterns that a key may name."""
MAX_NETWORKS: Final = 100
"""Most networks that a key may name."""


@dataclass(frozen=True, slots=True)
class KeyScope:
    """The models and routes that a key may use, and from where; ``None`` means all of them.

    Attributes:
        models: ids of models, or patterns of ids in which ``*`` stands for any text.
        routes: routes below ``/v1/``.
        addresses: the networks of clients that may use the key.
    """

    models: frozenset[str] | None = None
    routes: frozenset[Route] | None = None
    addresses: frozenset[Network] | None = None

    def __post_init__(self) -> None:
        if self.models is not None:
            if not 1 <= len(self.models) <= MAX_PATTERNS:
                raise ValueError(f"models: from 1 to {MAX_PATTERNS} of them")
            for pattern in self.models:
                if not _PATTERN.fullmatch(pattern):
                    raise ValueError(f"models: {pattern[:50]!r} is no id and no pattern of ids")
        if self.routes is not None and not self.routes:
            raise ValueError("routes: at least one of them")
        if self.addresses is not None and not 1 <= len(self.addresses) <= MAX_NETWORKS:
            raise ValueError(f"addresses: from 1 to {MAX_NETWORKS} of them")

    def allows_model(self, model_id: str) -> bool:
        """Return whether the key may use the model with this id."""
        if self.models is None or model_id in self.models:
            return True
        return any(fnmatchcase(model_id, pattern) for pattern in self.models)

    def allows_route(self, route: Route) -> bool:
        """Return whether the key may use the route."""
        return self.routes is None or route in self.routes

    def allows_address(self, address: Address | None) -> bool:
        """Return whether a client at an address may use the key; ``None`` for an unknown one."""
        if self.addresses is None:
            return True
        return address is not None and is_within(address, self.addresses)


def listed(parts: Iterable[str | Network] | None) -> list[str] | None:
    """Return models, routes or addresses as texts in order; ``None`` for all of them."""
    return None if parts is None else sorted(map(str, parts))


def joined(parts: Iterable[str | Network] | None) -> str | None:
    """Return models, routes or addresses as one text, separated by commas; ``None`` for all."""
    texts = listed(parts)
    return None if texts is None else ",".join(texts)


EVERYTHING: Final = KeyScope()
"""The scope of a key that names no models, routes or addresses."""
