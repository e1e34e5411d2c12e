"""Network addresses: networks in settings and keys, and which address a request came from. Pure.

An IPv4 address that is written as an IPv6 one (``::ffff:10.0.0.1``) counts as IPv4.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_LONGEST: Final = 100
"""Longest text of an address, in characters: an IPv6 address, its zone, brackets and a port."""
_WITH_PORT: Final = re.compile(r"\[(?P<v6>[^\[\]]+)\](:\d{1,5})?|(?P<v4>[\d.]+):\d{1,5}")


def parse_network(text: str) -> Network:
    """Return the network in a text; an address is a network of one.

    Raises:
        ValueError: it is none, or it has bits set beyond its prefix.
    """
    try:
        # A zone has a meaning on one machine alone.
        network = ip_network("" if "%" in text else text.strip())
    except ValueError:
        raise ValueError(
            f"{text[:50]!r} is no address and no network such as 10.0.0.0/8 or fd00::/8 (the bits "
            "after the prefix must be 0)"
        ) from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        low = IPv4Address(int(network.network_address) & 0xFFFF_FFFF)
        return IPv4Network((low, network.prefixlen - 96))
    return network


def parse_address(text: str) -> Address | None:
    """Return the address in an entry of ``X-Forwarded-For``, or ``None`` if it is none.

    Some proxies add a port; it is ignored.
    """
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    match = _WITH_PORT.fullmatch(text)
    if match is not None:
        text = match["v6"] or match["v4"]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        # Without its zone, which has a meaning on the proxy's machine alone.
        return address.ipv4_mapped or IPv6Address(int(address))
    return address


def is_within(address: Address, networks: Collection[Network]) -> bool:
    """Return whether an address belongs to one of these networks."""
    return any(address in network for network in networks)


def origin_of(
    connected: Address, forwarded: Sequence[str], trusted: Collection[Network]
) -> Address | None:
    """Return the address from which a request came, or ``None`` if it is unknown.

    Each proxy appends the address that has connected to it. So the list is read from its end, for
    as long as the address read before is that of a trusted proxy. What stands further left may be
    a client's invention.

    Args:
        connected: the address that has connected to the first server of our own.
        forwarded: the values of all ``X-Forwarded-For`` headers, in their order.
        trusted: the networks of proxies whose entry is believed.
    """
    entries = [entry for value in forwarded for entry in value.split(",")]
    address: Address | None = connected
    while address is not None and is_within(address, trusted):
        # A trusted proxy that names nobody leaves the client unknown.
        address = parse_address(entries.pop()) if entries else None
    return address
