"""Which TCP sockets of which processes listen on this machine, read from Linux's /proc."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

from deployments.process.reaper import OWNER_MARK, process_ids, read_stat

_PROC: Final = Path("/proc")
_LISTENING: Final = "0A"
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
        return _plain(ip_address(self.address)).is_loopback


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
    views = (_view(pid) for pid in process_ids())
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
    found: dict[int, Listener] = {}
    for view in views:
        held = set(_sockets(view.pid))
        for inode, (address, port) in _listening(view.pid).items() if held else ():
            if inode in held:
                found.setdefault(inode, Listener(address, port, view.name, view.pid))
    return sorted(found.values())


def parse_table(text: str) -> dict[int, tuple[str, int]]:
    """Return the address and port of each listening socket in /proc/net/tcp or tcp6, by inode."""
    found = {}
    for line in text.splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTENING:
            address, port = fields[1].split(":")
            found[int(fields[9])] = (_address(address), int(port, 16))
    return found


def _address(hexadecimal: str) -> str:
    """Return an address that the kernel shows as words in this machine's order of bytes."""
    words = (hexadecimal[i : i + 8] for i in range(0, len(hexadecimal), 8))
    packed = b"".join(socket.htonl(int(word, 16)).to_bytes(4, "big") for word in words)
    return str(_plain(ip_address(packed)))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _listening(pid: int) -> dict[int, tuple[str, int]]:
    found: dict[int, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        # By process, since each may be in a network namespace of its own.
        with suppress(OSError):
            found |= parse_table((_PROC / str(pid) / "net" / table).read_text())
    return found


def _sockets(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with suppress(OSError):
                kind, _, inode = os.readlink(entry.path).partition(":")
                if kind == "socket":
                    yield int(inode.strip("[]"))


def _view(pid: int) -> ProcessView | None:
    stat = read_stat(pid)
    if stat is None:
        return None
    environment = dict(_pairs(_words(pid, "environ")))
    return ProcessView(pid, stat.parent, tuple(_words(pid, "cmdline")), environment)


def _words(pid: int, what: str) -> list[str]:
    try:
        text = (_PROC / str(pid) / what).read_bytes()
    except OSError:
        # It has ended, or is another user's.
        return []
    return text.rstrip(b"\0").decode(errors="replace").split("\0")


def _pairs(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
