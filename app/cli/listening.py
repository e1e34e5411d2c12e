"""Which TCP sockets of which processes listen on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final

import psutil

from app.core.names import OWNER_MARK

_PARTS: Final = ("/site-packages/ray/dashboard/", "/site-packages/ray/autoscaler/")
_RAY: Final = frozenset({"raylet", "gcs_server", "serve"})


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """A socket that listens.

    Attributes:
        address: where.
        port: its port.
        process: what the process is called.
        pid: the process.
    """

    address: str
    port: int
    process: str
    pid: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ip_address(_plain(self.address)).is_loopback


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One process, as far as it can be read.

    Attributes:
        pid: its id.
        parent: its parent's.
        words: its command line.
        environment: what it was started with; empty where that may not be read.
    """

    pid: int
    parent: int
    words: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def name(self) -> str:
        """What people know it by: an actor's title, a program, or a script."""
        if not self.words or self.words[0].startswith("ray::"):
            return self.words[0].strip() if self.words else str(self.pid)
        for option, word in zip(self.words, self.words[1:], strict=False):
            if option == "-m":
                return word
        scripts = (w for w in self.words[1:] if w.endswith((".py", "/bin/serve")))
        return os.path.basename(next(scripts, self.words[0]))

    @property
    def is_rays_or_an_engines(self) -> bool:
        """Whether it belongs to a Ray cluster or an engine of Frontline by itself."""
        if not self.words:
            return False
        actor = self.words[0].startswith("ray::")
        part = any(folder in word for word in self.words[:4] for folder in _PARTS)
        named = self.name in _RAY
        return actor or part or named or OWNER_MARK in self.environment


def processes() -> dict[int, ProcessView]:
    """Return every process that can be seen, by id."""
    views = (_view(process) for process in psutil.process_iter())
    return {view.pid: view for view in views if view is not None}


def family(views: Mapping[int, ProcessView]) -> list[ProcessView]:
    """Return those that belong to Ray clusters and engines here, with all below them."""
    ours: dict[int, bool] = {}

    def belongs(pid: int) -> bool:
        if pid not in ours:
            # For as long as its parents are looked at; entries were read at different times.
            ours[pid] = False
            view = views.get(pid)
            ours[pid] = view is not None and (view.is_rays_or_an_engines or belongs(view.parent))
        return ours[pid]

    return [view for pid, view in views.items() if belongs(pid)]


def listeners(views: Iterable[ProcessView]) -> list[Listener]:
    """Return what these processes listen on, by address; of shared sockets one process each."""
    found: dict[tuple[str, int], Listener] = {}
    for view in views:
        # It has ended, or is another user's.
        with suppress(psutil.Error):
            for socket in psutil.Process(view.pid).net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    address, port = _plain(socket.laddr.ip), socket.laddr.port
                    found.setdefault((address, port), Listener(address, port, view.name, view.pid))
    return sorted(found.values())


def _plain(address: str) -> str:
    """Return an IPv4 address that is written as an IPv6 one as itself."""
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed)


def _view(process: psutil.Process) -> ProcessView | None:
    try:
        with process.oneshot():
            parent, words = process.ppid(), tuple(process.cmdline())
    except psutil.Error:
        return None
    environment: dict[str, str] = {}
    with suppress(psutil.Error):
        environment = process.environ()
    return ProcessView(process.pid, parent, words, environment)
