"""Ports for engines to listen on, handed over without a race. Linux only."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from types import TracebackType


@dataclass(frozen=True)
class ReservedPort:
    """A TCP port nobody else is given while this is open, and on which a child can listen."""

    host: str
    port: int
    _socket: socket.socket = field(repr=False)

    def close(self) -> None:
        """Give the port up. A server that listens on it goes on."""
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

    Asking for a free port, closing the socket and telling the child the number lets anyone take
    the port in between. Here the socket stays bound, never listening, for as long as the
    reservation is open, which on Linux leaves no such moment:

    - while no socket of a port listens, several may be bound to it if all have SO_REUSEADDR; so
      the child, which sets it as asyncio, uvicorn and the engines do, can bind and then listen;
    - a port with any socket bound to it is given neither to a bind to port 0, with SO_REUSEADDR or
      without, nor to an outgoing connection.

    What remains is a program that asks for this very number, which no reservation could prevent.
    The reservation outlives the child, so that a child started again gets the same port.

    Raises OSError if the address is not this machine's or no port is free.
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
