"""Which origins' web pages may call the API from a browser (CORS)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Self

ORIGIN: Final = r"^(\*|[a-z][a-z0-9+.-]*://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(\d{1,5}|\*))?)$"
"""Pattern of an allowed origin: scheme and host, and a port, where `*` is any or none; or `*`."""

_ANY: Final = "*"
_ANY_PORT: Final = ":*"


@dataclass(frozen=True, slots=True)
class OriginRule:
    """Which values of the `Origin` header are allowed.

    Attributes:
        pattern: the regular expression of them; empty if none is.
    """

    pattern: str
    _compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", re.compile(self.pattern))

    @classmethod
    def of(cls, allowed: Iterable[str]) -> Self:
        """Return the rule that allows these origins."""
        return cls("|".join(_pattern(origin) for origin in allowed))

    @property
    def none(self) -> bool:
        """Whether no origin is allowed."""
        return not self.pattern

    def allows(self, origin: str | None) -> bool:
        """Return whether a page of this origin may call; ``None`` is no page."""
        return origin is not None and not self.none and bool(self._compiled.fullmatch(origin))


def _pattern(origin: str) -> str:
    if origin == _ANY:
        return ".+"
    if origin.endswith(_ANY_PORT):
        return re.escape(origin.removesuffix(_ANY_PORT).lower()) + r"(?::[0-9]{1,5})?"
    return re.escape(origin.lower())
