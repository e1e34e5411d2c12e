"""What a key may be used for: models and routes. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from app.core.dialect import Route

_PATTERN: Final = re.compile(r"[A-Za-z0-9._:/@*-]{1,200}")
MAX_PATTERNS: Final = 100
"""Most models and patterns that a key may name."""


@dataclass(frozen=True, slots=True)
class KeyScope:
    """The models and routes that a key may use; ``None`` means all of them.

    Attributes:
        models: ids of models, or patterns of ids in which ``*`` stands for any text.
        routes: routes below ``/v1/``.
    """

    models: frozenset[str] | None = None
    routes: frozenset[Route] | None = None

    def __post_init__(self) -> None:
        if self.models is not None:
            if not 1 <= len(self.models) <= MAX_PATTERNS:
                raise ValueError(f"models: from 1 to {MAX_PATTERNS} of them")
            for pattern in self.models:
                if not _PATTERN.fullmatch(pattern):
                    raise ValueError(f"models: {pattern[:50]!r} is no id and no pattern of ids")
        if self.routes is not None and not self.routes:
            raise ValueError("routes: at least one of them")

    def allows_model(self, model_id: str) -> bool:
        """Return whether the key may use the model with this id."""
        if self.models is None or model_id in self.models:
            return True
        return any(fnmatchcase(model_id, pattern) for pattern in self.models)

    def allows_route(self, route: Route) -> bool:
        """Return whether the key may use the route."""
        return self.routes is None or route in self.routes


def joined(parts: frozenset[str] | None) -> str | None:
    """Return models or routes as one text, separated by commas; ``None`` for all of them."""
    return None if parts is None else ",".join(sorted(parts))


EVERYTHING: Final = KeyScope()
"""The scope of a key that names no models and no routes."""
