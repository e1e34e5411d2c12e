"""Finds the listening TCP sockets on this machine, and their processes."""

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
    """A listening socket.

    Attributes:
        address: its address.
        port: its port.
        process: the name of its process.
        pid: the id of its process.
    """

    address: str
    port: int
    process: str
    pid: int

    @property
    def on_loopback(self) -> bool:
        """Whether it can be reached from this machine only."""
        return ip_address(_plain(self.address)).is_loopback


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One process, as far as it can be read.

    Attributes:
        pid: its id.
        parent: its parent's id.
        words: its command line.
        environment: its environment at the start; empty if it may not be read.
    """

    pid: int
    parent: int
    words: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def name(self) -> str:
        """A name for display: an actor's title, a program, or a script."""
        if not self.words or self.words[0].startswith("ray::"):
            return self.words[0].strip() if self.words else str(self.pid)
        for option, word in zip(self.words, self.words[1:], strict=False):
            if option == "-m":
                return word
        scripts = (w for w in self.words[1:] if w.endswith((".py", "/bin/serve")))
        return os.path.basename(next(scripts, self.words[0]))

    @property
    def is_rays_or_an_engines(self) -> bool:
        """Whether it is itself part of a Ray cluster or an engine of Frontline."""
        if not self.words:
            return False
        actor = self.words[0].startswith("ray::")
        part = any(folder in word for word in self.words[:4] for folder in _PARTS)
        named = self.name in _RAY
        return actor or part or named or OWNER_MARK in self.environment


def processes() -> dict[int, ProcessView]:
    """Return all visible processes, by id."""
    views = (_view(process) for process in psutil.process_iter())
    return {view.pid: view for view in views if view is not None}


def family(views: Mapping[int, ProcessView]) -> list[ProcessView]:
    """Return the processes of Ray clusters and engines here, with all their descendants."""
    ours: dict[int, bool] = {}

    def belongs(pid: int) -> bool:
        if pid not in ours:
            # Guards against a cycle of parents: the entries were read at different times.
            ours[pid] = False
            view = views.get(pid)
            ours[pid] = view is not None and (view.is_rays_or_an_engines or belongs(view.parent))
        return ours[pid]

    return [view for pid, view in views.items() if belongs(pid)]


def listeners(views: Iterable[ProcessView]) -> list[Listener]:
    """Return the listening sockets of these processes by address, one process per shared socket."""
    found: dict[tuple[str, int], Listener] = {}
    for view in views:
        # The process has ended or belongs to another user.
        with suppress(psutil.Error):
            for socket in psutil.Process(view.pid).net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    address, port = _plain(socket.laddr.ip), socket.laddr.port
                    found.setdefault((address, port), Listener(address, port, view.name, view.pid))
    return sorted(found.values())


def _plain(address: str) -> str:
    """Return the IPv4 address of an IPv4-mapped IPv6 address; other addresses unchanged."""
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
