"""Which address a request came from, and whether its key may be used from there.

An ingress is reached through HAProxy, on its own node or on another one, so the address of its
connection is not the client's. Serve's HAProxy names no client, and passes on whatever
``X-Forwarded-For`` a client sends. ``app.haproxy.config`` therefore adds a header with the address
that has connected to HAProxy, and a proof that HAProxy has written it. A request without it has
come in another way, and its address is unknown.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from app import alarms
from app.core import errors
from app.core.addresses import Address, origin_of, parse_address
from app.gateway.services import Services
from app.haproxy.config import CLIENT_HEADER
from app.tenants.access import Caller

HeaderLines = Sequence[tuple[bytes, bytes]]
"""The headers of a request as they came: names in lower case, one entry for each line."""
_CLIENT: Final = CLIENT_HEADER.encode()


def require_address(services: Services, caller: Caller, lines: HeaderLines) -> None:
    """Reject a request whose key may not be used from its client's address.

    Raises:
        AddressNotAllowed: the address is not among those of the key, or it is unknown.
    """
    if may_come_from(services, caller, lines):
        return
    if client_address(services, lines) is None:
        alarms.PROCESS.raised(
            "client address unknown",
            "a key with allowed addresses was refused: the request came past Frontline's HAProxy, "
            "or Ray's token differs between nodes, or a trusted proxy has named no client",
        )
    raise errors.AddressNotAllowed


def may_come_from(services: Services, caller: Caller, lines: HeaderLines) -> bool:
    """Return whether a caller's key may be used from the address that its request came from."""
    if caller.key is None or caller.key.scope.addresses is None:
        return True
    return caller.key.scope.allows_address(client_address(services, lines))


def client_address(services: Services, lines: HeaderLines) -> Address | None:
    """Return the address of a request's client, or ``None`` if it is unknown."""
    connected, forwarded = None, []
    for name, value in lines:
        if name == _CLIENT:
            connected = _connected(value, services.proxy_proof)
        elif name == b"x-forwarded-for":
            forwarded.append(value.decode("latin-1"))
    if connected is None:
        return None
    return origin_of(connected, forwarded, services.settings.trusted_networks)


def _connected(value: bytes, proof: str | None) -> Address | None:
    """Return the address that has connected to HAProxy, if HAProxy says so."""
    given, _, address = value.partition(b" ")
    if not proof or not hmac.compare_digest(given, proof.encode()):
        return None
    return parse_address(address.decode("latin-1"))
