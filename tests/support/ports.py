"""Ports of Ray Serve's own for clusters that stand beside each other on one machine."""

from __future__ import annotations

import socket

_FIRST, _BLOCKS, _EACH = 20000, 40, 250
_claimed: list[socket.socket] = []
"""Held for as long as this process lives: each marks a block as taken."""


def claim_serve_ports() -> dict[str, str]:
    """Return the settings of a cluster's ports: a block that no other living process of tests has.

    They are below those that the kernel gives to connections, so that none of them is taken by
    chance. Serve passes over ports of ingress replicas that are in use; but two clusters that look
    at the same moment would take the same. A fallback proxy that is another cluster's would answer
    for models that are not there.
    """
    first = next(filter(_claim, range(_FIRST, _FIRST + _BLOCKS * _EACH, _EACH)))
    last = first + _EACH - 1
    ports = {
        "DIRECT_INGRESS_MIN_HTTP_PORT": first,
        "DIRECT_INGRESS_MAX_HTTP_PORT": last - 10,
        "HAPROXY_METRICS_PORT": last,
        "HAPROXY_STATS_PORT": last - 1,
        "FALLBACK_PROXY_HTTP_PORT": last - 2,
        "FALLBACK_PROXY_GRPC_PORT": last - 3,
    }
    return {f"RAY_SERVE_{name}": str(port) for name, port in ports.items()}


def _claim(first: int) -> bool:
    """Take a block by the one port of it that no cluster uses."""
    mark = socket.socket()
    try:
        mark.bind(("127.0.0.1", first + _EACH - 5))
    except OSError:
        mark.close()
        return False
    _claimed.append(mark)
    return True
