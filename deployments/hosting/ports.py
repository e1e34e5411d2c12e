"""Reserves ports for engines to listen on, without a race. Linux only."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from types import TracebackType


@dataclass(frozen=True)
class ReservedPort:
    """A TCP port that the kernel gives to no other process while this is open.

    A child process can listen on it.
    """

    host: str
    port: int
    _socket: socket.socket = field(repr=False)

    def close(self) -> None:
        """Release the port. A server that listens on it keeps running."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def reserve_port(host: str = "127.0.0.1") -> ReservedPort:
    """Reserve a free TCP port of ``host`` (an IP address) for a child process to listen on.

    The usual way is to bind to port 0, close the socket and pass the number to the child. Another
    process can take the port in between. Here the socket stays bound while the reservation is
    open, and never listens. On Linux this closes the gap:

    - While no socket listens on a port, several sockets may be bound to it if all have
      SO_REUSEADDR. The child sets that option, as asyncio, uvicorn and the engines do, so it can
      bind and then listen.
    - The kernel gives a port with any bound socket neither to a bind to port 0, with or without
      SO_REUSEADDR, nor to an outgoing connection.

    A program that requests this very number can still take it; no reservation could prevent that.
    The reservation outlives the child, so that a restarted child gets the same port.

    Raises:
        OSError: the address is not this machine's, or no port is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, 0))
    except BaseException:
        bound.close()
        raise
    return ReservedPort(host, bound.getsockname()[1], bound)
