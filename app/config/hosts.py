"""Which values of the `Host` header are served."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Self

from app.core import errors

ANY_HOST: Final = "*"


LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


HOST_NAME: Final = r"^(\*|[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*)$"
"""Pattern of an allowed host: a name or an address, without a port or brackets; or `*`."""


_HOST: Final = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]:/@\s]+))(?::\d{1,5})?")


@dataclass(frozen=True, slots=True)
class HostRule:
    """Which values of the `Host` header are served.

    Attributes:
        names: names and addresses in lower case, without ports; ``None`` serves every host.
    """

    names: frozenset[str] | None

    @classmethod
    def of(cls, allowed: Iterable[str]) -> Self:
        """Return the rule that allows loopback and these hosts; with `*`, every host."""
        names = frozenset(_plain(name) for name in allowed)
        return cls(None if ANY_HOST in names else names | LOOPBACK_NAMES)

    def require(self, headers: Mapping[bytes, bytes]) -> None:
        """Reject a request whose `Host` is not allowed, or missing.

        Raises:
            HostNotAllowed: the header is missing or not allowed.
        """
        if not self.allows(headers):
            raise errors.HostNotAllowed

    def allows(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a request with these headers may be served."""
        if self.names is None:
            return True
        match = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
        if match is None:
            return False
        name = _plain(match["v6"] or match["name"])
        return name in self.names or _is_loopback(name)


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
