"""Starts HAProxy for Ray Serve, and keeps the port served while Serve replaces HAProxy.

Linux only. Standard library only, because it runs alone, called by ``scripts/haproxy``:

    python3 -I -S keeper.py BINARY ARGUMENTS...

If HAProxy or the actor that manages it dies, Serve notices after three failed health checks. It
then starts a new actor and a new HAProxy, whose first configuration has no routes. Until then every
request would be refused or get a 404. Three mechanisms close that gap:

- **A watcher**: a detached process for each HAProxy. If HAProxy ends without a successor, the
  watcher immediately starts a stand-in with the same configuration. The stand-in has its own admin
  socket, so Serve's health checks keep failing and Serve still replaces it. The stand-in ends when
  it has been replaced, when Ray's node process (raylet) ends, or once no ingress in its
  configuration can be reached.
- **Takeover**: the next HAProxy receives the listening sockets of the serving process (``-x``) and
  signals it to finish (``-sf``), as in Serve's own reloads. No connection is refused.
- **Routes**: an HAProxy that Serve starts without routes gets the routes of its predecessor on the
  same node. Without a predecessor it answers 503, which clients retry (``app/haproxy/config.py``).

The files are in HAProxy's own folder, one per node: ``serving`` (the serving process and its admin
socket), ``kept.cfg`` (the last configuration that was proven to work), ``keeper.log``.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

READY_S = 60.0
"""How long HAProxy may take to answer its admin socket; Serve itself gives up after 30 s."""
READY_POLL_S = 0.05
IDLE_POLL_S = 5.0
"""How often a watcher checks whether a reload has replaced its HAProxy. Only the watcher's own end
waits for that."""
ANSWER_S = 5.0
"""How long the serving process may take to answer its successor, which otherwise kills it. A
healthy process takes milliseconds."""
STAND_IN_POLL_S = 0.5
UNREACHABLE_S = 5.0
"""A stand-in ends when no ingress has accepted a connection for this long: Serve was shut down."""
RESTART_PAUSE_S = 0.2
MOST_LOG_BYTES = 1_000_000

_DRAINING = "This node is being drained."
_ADMIN_SOCKET = re.compile(r"^(\s*stats socket )(\S+)", re.MULTILINE)
_BIND = re.compile(r"^\s*bind .*$", re.MULTILINE)
_USES_BACKEND = re.compile(r"^\s*use_backend ", re.MULTILINE)
_SERVER = re.compile(r"^\s*server \S+ (\S+):(\d+)(.*)$", re.MULTILINE)


def has_routes(config: str) -> bool:
    """Return whether a configuration forwards requests to any application."""
    return _USES_BACKEND.search(config) is not None


def keepable(config: str) -> bool:
    """Return whether a stand-in may use a configuration: it has routes and is not draining."""
    return has_routes(config) and _DRAINING not in config


def same_ports(one: str, other: str) -> bool:
    """Return whether two configurations listen on the same addresses."""
    return _BIND.findall(one) == _BIND.findall(other)


def admin_socket(config: str) -> str:
    """Return the path of a configuration's admin socket; empty if it has none."""
    found = _ADMIN_SOCKET.search(config)
    return found[2] if found else ""


def with_admin_socket(config: str, path: str) -> str:
    """Return the configuration with another admin socket."""
    return _ADMIN_SOCKET.sub(lambda found: found[1] + path, config)


def ingresses(config: str) -> set[tuple[str, int]]:
    """Return the addresses of the servers that get requests, without Serve's fallback server."""
    servers = (found.groups() for found in _SERVER.finditer(config))
    return {(host, int(port)) for host, port, rest in servers if " backup" not in rest}


def first_configuration(config: str, kept: str | None) -> str:
    """Return the configuration for an HAProxy that replaces none; kept routes if it has none."""
    if kept is not None and not has_routes(config) and same_ports(config, kept):
        return with_admin_socket(kept, admin_socket(config))
    return config


class Serving(NamedTuple):
    """The HAProxy that holds the listening sockets: pid, start time in ticks, admin socket."""

    pid: int
    start: int
    admin_socket: str


def takeover(arguments: Sequence[str], serving: Serving | None) -> list[str]:
    """Return arguments that take over the listening sockets of the serving process."""
    if serving is None or str(serving.pid) in arguments:
        return list(arguments)
    kept = list(arguments)
    if "-x" in kept:
        at = kept.index("-x")
        del kept[at : at + 2]
    # -sf comes last, because any number of pids may follow it.
    return [*kept, "-x", serving.admin_socket, "-sf", str(serving.pid)]


class Folder:
    """The files of one node's HAProxy."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stand_in = path / "stand-in.cfg"
        self.stand_in_socket = path / "stand-in.sock"

    @property
    def serving(self) -> Serving | None:
        """The last known serving process, if it still runs."""
        try:
            pid, start, path = (self._path / "serving").read_text().split(maxsplit=2)
            found = Serving(int(pid), int(start), path)
        except (OSError, ValueError):
            return None
        return found if start_time(found.pid) == found.start else None

    def claim(self, serving: Serving) -> None:
        """Record that this process serves now."""
        self._write("serving", f"{serving.pid} {serving.start} {serving.admin_socket}")

    def is_serving(self, pid: int) -> bool:
        """Return whether this process was the last to claim to serve. It may have ended."""
        try:
            return (self._path / "serving").read_text().split()[0] == str(pid)
        except (OSError, IndexError):
            return False

    @property
    def kept(self) -> str | None:
        """The last configuration that a stand-in may use."""
        try:
            return (self._path / "kept.cfg").read_text()
        except OSError:
            return None

    def stage(self, pid: int, config: str) -> None:
        """Store a configuration until it is proven to work."""
        self._write(f"staged.{pid}", config)

    def keep_staged(self, pid: int) -> None:
        """Keep the configuration of a process that has started with it, if it is keepable."""
        staged = self._path / f"staged.{pid}"
        if keepable(staged.read_text()):
            staged.rename(self._path / "kept.cfg")
        else:
            staged.unlink()
            (self._path / "kept.cfg").unlink(missing_ok=True)

    def drop_staged(self, pid: int) -> None:
        """Delete the stored configuration of a process that did not start."""
        (self._path / f"staged.{pid}").unlink(missing_ok=True)

    def log(self, message: str) -> None:
        """Write a line to ``keeper.log``; Serve deletes what HAProxy wrote when it restarts."""
        with suppress(OSError), (self._path / "keeper.log").open("a") as log:
            if log.tell() > MOST_LOG_BYTES:
                log.truncate(0)
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def _write(self, name: str, text: str) -> None:
        new = self._path / f"{name}.{os.getpid()}.new"
        new.write_text(text)
        new.rename(self._path / name)


def start_time(pid: int) -> int:
    """Return when a process started, in ticks since boot; 0 if it has ended."""
    words = _stat(pid)
    return 0 if not words or words[0] in "ZX" else int(words[19])


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0 if it has ended."""
    words = _stat(pid)
    return int(words[1]) if words else 0


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def answering_pid(path: str) -> int:
    """Return the pid of the HAProxy that answers on an admin socket; 0 if none does."""
    try:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(1.0)
            admin.connect(path)
            admin.sendall(b"show info\n")
            answer = b"".join(iter(lambda: admin.recv(65536), b""))
    except OSError:
        return 0
    found = re.search(rb"^Pid: (\d+)$", answer, re.MULTILINE)
    return int(found[1]) if found else 0


def reachable(addresses: set[tuple[str, int]]) -> bool:
    """Return whether any of these addresses accepts a connection."""
    for address in addresses:
        with suppress(OSError), socket.create_connection(address, timeout=1.0):
            return True
    return False


def start(binary: str, arguments: Sequence[str]) -> None:
    """Start a watcher, and then become HAProxy."""
    if "-f" not in arguments:
        os.execv(binary, [binary, *arguments])
    path = Path(arguments[arguments.index("-f") + 1])
    folder = Folder(path.parent)
    config = path.read_text()
    changed = config if "-sf" in arguments else first_configuration(config, folder.kept)
    if changed != config:
        path.write_text(changed)
    folder.stage(os.getpid(), changed)
    taking_over = takeover(arguments, predecessor(folder, arguments))
    # Serve's manager is the parent, and its parent is the raylet.
    raylet = parent_of(os.getppid())
    _start_watcher(path.parent, raylet, admin_socket(changed), binary, arguments)
    os.execv(binary, [binary, *taking_over])


def predecessor(folder: Folder, arguments: Sequence[str]) -> Serving | None:
    """Return the serving process, to take over its sockets. One that does not answer is killed.

    HAProxy does not start if it should take over sockets and receives none.
    """
    serving = folder.serving
    if serving is None or str(serving.pid) in arguments:
        return serving
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        if answering_pid(serving.admin_socket) == serving.pid:
            return serving
        time.sleep(READY_POLL_S)
    folder.log(
        f"HAProxy {serving.pid} does not answer; it is killed, and replaced by {os.getpid()}"
    )
    # Claim before the kill, so that its watcher does not start a stand-in.
    folder.claim(Serving(os.getpid(), start_time(os.getpid()), ""))
    with suppress(ProcessLookupError):
        os.kill(serving.pid, signal.SIGKILL)
    return None


def _start_watcher(
    folder: Path, raylet: int, admin: str, binary: str, arguments: Sequence[str]
) -> None:
    """Start the watcher as a detached process, because Ray kills an actor's children with it."""
    pid = os.getpid()
    words = [sys.executable, "-I", "-S", __file__, "--watch", str(folder)]
    words += [str(pid), str(raylet), admin, binary, *_common(arguments)]
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.execv(sys.executable, words)


def _common(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments for a stand-in: all but the configuration and the replaced processes."""
    words = iter(arguments)
    for word in words:
        if word in ("-f", "-x"):
            next(words)
        elif word == "-sf":
            return
        else:
            yield word


class Watcher:
    """Watches one HAProxy, and starts a stand-in if it ends without a successor."""

    def __init__(self, folder: Folder, pid: int, raylet: int, admin: str) -> None:
        self._folder = folder
        self._pid = pid
        self._start = start_time(pid)
        self._admin = admin
        self._haproxy = os.pidfd_open(pid)
        self._raylet = os.pidfd_open(raylet)

    def run(self, command: Sequence[str]) -> None:
        """Watch HAProxy, and any stand-in; return when neither has to be watched any more."""
        if not self._becomes_ready():
            self._folder.drop_staged(self._pid)
            return
        self._folder.claim(Serving(self._pid, self._start, self._admin))
        self._folder.keep_staged(self._pid)
        if self._ends_in_service():
            self._stand_in(command)

    def _becomes_ready(self) -> bool:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if answering_pid(self._admin) == self._pid:
                return True
            if _ended(READY_POLL_S, self._haproxy, self._raylet):
                return False
        return False

    def _ends_in_service(self) -> bool:
        """Wait for the end of HAProxy; return whether it has no successor and needs a stand-in."""
        while True:
            ended = _ended(IDLE_POLL_S, self._haproxy, self._raylet)
            if self._raylet in ended or not self._folder.is_serving(self._pid):
                return False
            if self._haproxy in ended:
                return self._folder.kept is not None

    def _stand_in(self, command: Sequence[str]) -> None:
        folder = self._folder
        config = with_admin_socket(folder.kept or "", str(folder.stand_in_socket))
        folder.stand_in.write_text(config)
        servers = ingresses(config)
        folder.log(f"HAProxy {self._pid} has ended without a successor; a stand-in takes its place")
        while True:
            child = os.spawnv(os.P_NOWAIT, command[0], [*command, "-f", str(folder.stand_in)])
            folder.claim(Serving(child, start_time(child), str(folder.stand_in_socket)))
            status = self._wait(child, servers)
            if status == 0 or not folder.is_serving(child):
                folder.log(f"the stand-in {child} has ended, with status {status}")
                return
            folder.log(f"the stand-in {child} died, with status {status}; starting another")
            if _ended(RESTART_PAUSE_S, self._raylet):
                return

    def _wait(self, child: int, servers: set[tuple[str, int]]) -> int:
        """Wait for the stand-in to end, or end it; return its exit status, or minus its signal."""
        process = os.pidfd_open(child)
        reached = time.monotonic()
        try:
            while not (ended := _ended(STAND_IN_POLL_S, process, self._raylet)):
                if not self._folder.is_serving(child):
                    continue  # it finishes its connections
                now = time.monotonic()
                if reachable(servers):
                    reached = now
                elif now - reached > UNREACHABLE_S:
                    break
            if process not in ended:
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
                return 0
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os.close(process)


def _ended(timeout_s: float, *processes: int) -> list[int]:
    """Wait until one of these processes ends, or for the timeout; return those that have ended."""
    poll = select.poll()
    for process in processes:
        poll.register(process, select.POLLIN)
    return [process for process, _ in poll.poll(timeout_s * 1000)]


def watch(folder: str, pid: str, raylet: str, admin: str, *command: str) -> None:
    """Run the watcher's process. Errors go to the log, because its output is not read."""
    files = Folder(Path(folder))
    try:
        Watcher(files, int(pid), int(raylet), admin).run(command)
    except BaseException as error:
        files.log(f"the watcher of HAProxy {pid} failed: {error!r}")
        raise


def main(words: Sequence[str]) -> None:
    if words[0] == "--watch":
        watch(*words[1:])
    else:
        start(words[0], words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
