"""The port that Serve opens in every replica, kept on loopback.

Serve 2.60 has each replica listen for gRPC calls of other deployments on every address, also where
handles do not use gRPC (``RAY_SERVE_USE_GRPC_BY_DEFAULT=0``, see scripts/activate). It unpickles
what comes, so that whoever may speak to it runs code; only Ray's token stands before it, and
nothing at all where token authentication is off. Nobody speaks to it here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

_EVERYWHERE: Final = "[::]:0"
_LOOPBACK: Final = "127.0.0.1:0"
_BINDS: Final = "add_port_to_grpc_server"

_log = logging.getLogger("ray.serve")


def keep_on_loopback() -> None:
    """Have Serve open the port of this process on loopback; called when a deployment is made."""
    from ray.serve._private import constants, replica

    if constants.RAY_SERVE_USE_GRPC_BY_DEFAULT:
        # Handles on other nodes connect to it.
        return
    real = getattr(replica, _BINDS, None)
    if real is None:
        _log.error(
            "this version of Serve opens its gRPC port in another way: see `frontline doctor`"
        )
    elif not isinstance(real, partial):
        setattr(replica, _BINDS, partial(_bind, real))


def _bind(real: Callable[[Any, str], int], server: Any, address: str) -> int:
    return real(server, _LOOPBACK if address == _EVERYWHERE else address)
