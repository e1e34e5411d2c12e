"""Ports of Ray Serve's own for clusters that stand beside each other on one machine."""

from __future__ import annotations

_FIRST, _CLUSTERS, _EACH = 20000, 40, 250


def serve_ports(number: int) -> dict[str, str]:
    """Return the settings of a cluster's ports, which those of most other numbers do not share.

    They are below those that the kernel gives to connections, so that none of them is taken by
    chance. Serve passes over ports of ingress replicas that are in use; but two clusters that look
    at the same moment would take the same. A fallback proxy that is another cluster's would answer
    for models that are not there.
    """
    first = _FIRST + number % _CLUSTERS * _EACH
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
