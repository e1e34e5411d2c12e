"""The process between an owner (a Ray actor) and its engine. It leaves no engine process behind.

Linux only. Standard library only, and no import from this package, because it runs alone:

    python -I -S reaper.py --owner PID:START [--owner-grace S] [--linger S] -- COMMAND...

Standard input is one end of a Unix socket pair whose other end only the owner holds; stdout and
stderr are the engine's log. The first line read is the engine's environment, a JSON object. The
following lines are orders:

    stop SECONDS    SIGTERM to the engine; SIGKILL to every descendant when SECONDS have passed
    kill            SIGKILL to every descendant now, as ``stop 0``

End of file means that the owner has died, for any reason. Reports written to the owner:

    started PID REAPER    the engine runs as PID; REAPER is this process, as PID:START
    failed ERRNO TEXT     the command could not be run
    exited STATUS         the engine's main process has ended: exit status, or minus a signal
    gone                  no process of the engine is left

Reasons for this design:
- Engines leave processes behind when their main process is killed, some in sessions of their own.
  This process is a child subreaper and inherits every orphan. So "no child left" (ECHILD) proves
  that no descendant is left.
- Ray SIGKILLs the direct children of an actor that exits or is killed, also those in another
  session. So this process detaches: it is not a child of its owner, and outlives it on purpose.
- The engine gets a temporary folder of its own, which is removed when no process of it is left.
- If this process itself is SIGKILLed, the engine's main process dies with it (PDEATHSIG). A later
  sweep finds the other processes by the environment marks below.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

OWNER_MARK = "FRONTLINE_OWNER"
"""Environment variable of every engine process: its owner's identity, as PID:START."""
REAPER_MARK = "FRONTLINE_REAPER"
"""Environment variable of every engine process: its reaper's identity, as PID:START."""

TEMPORARY = "frontline-"
"""What the names of engines' temporary folders begin with."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
TIDY_S = 1.0
"""How long a process that cleans up may outlive all others before it gets SIGKILL too."""
_ENDED = "ZX"
"""States in /proc/PID/stat of a process that has ended and waits to be reaped."""
_KILL_AGAIN_S = 0.2
"""Longest time between two passes over the tree while a process survives SIGKILL. A death wakes the
loop at once. This bound is for processes forked during a pass or stuck in the kernel."""


class Identity(NamedTuple):
    """The unique identity of a process: its pid and its start time in clock ticks since boot."""

    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.pid}:{self.start}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Return the identity written as ``PID:START``. Raises ValueError for anything else."""
        pid, start = text.split(":")
        return cls(int(pid), int(start))

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Return the identity of a process. Raises ProcessLookupError if it does not exist."""
        stat = read_stat(pid)
        if stat is None:
            raise ProcessLookupError(f"no process {pid}")
        return stat.identity


class ProcessStat(NamedTuple):
    """The fields used from /proc/PID/stat."""

    identity: Identity
    state: str
    parent: int


def read_stat(pid: int) -> ProcessStat | None:
    """Return the process's entry in /proc; None if it has vanished or may not be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # The name in parentheses may itself contain spaces and parentheses: count from the last one.
    fields = text[text.rindex(b")") + 2 :].split()
    return ProcessStat(Identity(pid, int(fields[19])), fields[0].decode(), int(fields[1]))


def is_running(identity: Identity) -> bool:
    """Return whether exactly this process still runs. A zombie does not."""
    stat = read_stat(identity.pid)
    return stat is not None and stat.identity == identity and stat.state not in _ENDED


def has_ended(identity: Identity) -> bool:
    """Return whether this process has certainly ended. An unreadable entry proves nothing."""
    try:
        os.kill(identity.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, so perhaps another process: check /proc
    stat = read_stat(identity.pid)
    return stat is not None and (stat.identity != identity or stat.state in _ENDED)


def process_ids() -> Iterator[int]:
    """Return the pids of all visible processes."""
    return (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())


def descendants(root: int) -> list[ProcessStat]:
    """Return every process below ``root`` that has an entry in /proc, in any session or group."""
    children: dict[int, list[ProcessStat]] = {}
    for stat in filter(None, map(read_stat, process_ids())):
        children.setdefault(stat.parent, []).append(stat)
    found: list[ProcessStat] = []
    frontier = [root]
    while frontier:
        # `pop` visits each parent only once, although the entries were read at different times.
        below = children.pop(frontier.pop(), [])
        found += below
        frontier += (stat.identity.pid for stat in below)
    return found


def open_pidfd(pid: int) -> int | None:
    """Return a pidfd; None if the process is gone, or the kernel (< 5.3) or a sandbox has none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def signal_exactly(identity: Identity, signum: int) -> bool:
    """Send a signal to this process, and never to another one that has reused its pid.

    Returns whether the signal was sent. The pidfd is opened before the identity is checked, so the
    checked process is the one that gets the signal.
    """
    pidfd = open_pidfd(identity.pid)
    try:
        if not is_running(identity):
            return False
        if pidfd is None:
            os.kill(identity.pid, signum)
        else:
            signal.pidfd_send_signal(pidfd, signum)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if pidfd is not None:
            os.close(pidfd)
    return True


def tidies_up(pid: int) -> bool:
    """Return whether this is a resource tracker of Python's multiprocessing.

    The tracker unlinks the engine's shared memory once all other processes of the engine have
    ended, and then exits. If it is killed together with them, that memory (160 MiB for one vLLM)
    is never freed.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"\0from multiprocessing.resource_tracker import main" in file.read()
    except OSError:
        return False


def temporary_folder(parent: str, reaper: Identity) -> str:
    """Return the path of the temporary folder of a reaper's engine.

    It names the pid namespace, in which alone the pid has a meaning. It is short, because engines
    make sockets there, whose paths have at most 107 bytes.
    """
    namespace = "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))
    return f"{parent}/{TEMPORARY}{namespace}-{reaper.pid}-{reaper.start}"


def remove_folder(path: str) -> None:
    """Remove a folder with everything in it, as far as it can be removed."""
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.isdir(path):
        return
    # An engine may have left folders that nobody may read.
    for folder, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):
                with contextlib.suppress(OSError):
                    os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)


class Order(NamedTuple):
    """The command to run, its owner, and the grace periods in seconds."""

    command: Sequence[str]
    owner: Identity
    owner_grace: float
    linger: float


class Reaper:
    """Runs one engine and ends all its processes.

    It has one thread only, because PDEATHSIG is tied to a thread.
    """

    def __init__(self, order: Order, owner: socket.socket) -> None:
        self._order = order
        self._owner = owner
        self._received = b""
        self._engine: subprocess.Popen[bytes] | None = None
        self._temporary = ""
        self._deadline = math.inf  # when SIGKILL starts
        self._tidied_by = math.inf  # when it reaches processes that clean up
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Start the engine; return when no process of it is left."""
        environment = self._read_environment()
        self._watch_signals()
        self._watch_owner()
        if environment is None or not is_running(self._order.owner):
            return
        try:
            if self._start_engine(environment):
                self._handle_orders(b"")  # orders that came with the environment
                while self._reap():
                    self._wait_and_react()
                self._remove_temporary()
                self._report("gone")
        finally:
            self._kill_all()  # finds nothing, unless an error of our own ended the loop
            self._remove_temporary()

    def _read_environment(self) -> dict[str, str] | None:
        """Return the first line from the owner; None if the owner died before it sent one."""
        while b"\n" not in self._received:
            received = self._receive()
            if not received:
                return None
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        environment: dict[str, str] = json.loads(line)
        return environment

    def _watch_signals(self) -> None:
        """Turn signals into bytes that the selector reads, so that no code runs in a handler."""
        woken, wakes = socket.socketpair()
        woken.setblocking(False)
        wakes.setblocking(False)
        self._wakes = wakes
        self._selector.register(woken, selectors.EVENT_READ, self._on_signals)
        for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        # Neither the reaper nor the engine may inherit signals that the owner's thread blocked.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _watch_owner(self) -> None:
        """Watch for orders and for the owner's death.

        End of file is not enough: a forked child of the owner may keep the socket open after it.
        """
        self._selector.register(self._owner, selectors.EVENT_READ, self._on_orders)
        pidfd = open_pidfd(self._order.owner.pid)
        if pidfd is not None:
            self._selector.register(pidfd, selectors.EVENT_READ, self._on_owner_death)

    def _start_engine(self, environment: dict[str, str]) -> bool:
        identity = Identity.of(os.getpid())
        marks = {OWNER_MARK: str(self._order.owner), REAPER_MARK: str(identity)}
        # Engines use setproctitle, which overwrites the environment that /proc shows, including
        # the marks, unless this is set.
        marks["SPT_NOENV"] = "1"
        marks |= self._make_temporary(environment.get("TMPDIR") or "/tmp", identity)
        try:
            self._engine = subprocess.Popen(
                self._order.command,
                env=environment | marks,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        except OSError as error:
            self._report(f"failed {error.errno or 0} {error.strerror or error}")
            return False
        self._report(f"started {self._engine.pid} {identity}")
        return True

    def _make_temporary(self, parent: str, identity: Identity) -> dict[str, str]:
        """Make the engine's temporary folder; return the variable that names it."""
        folder = temporary_folder(parent, identity)
        try:
            os.mkdir(folder, 0o700)
        except OSError as error:
            print(f"the engine has no temporary folder of its own: {error}", flush=True)
            return {}
        self._temporary = folder
        return {"TMPDIR": folder}

    def _remove_temporary(self) -> None:
        folder, self._temporary = self._temporary, ""
        if folder:
            remove_folder(folder)

    def _reap(self) -> bool:
        """Reap all ended children; return whether any child, and so any descendant, is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if self._engine is not None and pid == self._engine.pid:
                self._on_engine_end(os.waitstatus_to_exitcode(status))

    def _on_engine_end(self, status: int) -> None:
        assert self._engine is not None
        self._engine.returncode = status  # also keeps Popen from waiting for this pid again
        self._report(f"exited {status}")
        # The remaining processes may clean up (Python's resource tracker unlinks shared memory),
        # but not keep running.
        self._deadline = min(self._deadline, time.monotonic() + self._order.linger)

    def _wait_and_react(self) -> None:
        """Kill what is left if the deadline has passed; then wait for the next event."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            self._kill_descendants()
            remaining = _KILL_AGAIN_S
        timeout = None if math.isinf(remaining) else remaining
        for key, _ in self._selector.select(timeout):
            key.data(key.fileobj)

    def _kill_descendants(self) -> None:
        """Send SIGKILL once to each process; processes that clean up get it ``TIDY_S`` later."""
        left = [stat.identity for stat in descendants(os.getpid()) if stat.state not in _ENDED]
        others = [identity for identity in left if not tidies_up(identity.pid)]
        if others or math.isinf(self._tidied_by):
            self._tidied_by = time.monotonic() + TIDY_S
        for identity in others if time.monotonic() < self._tidied_by else left:
            signal_exactly(identity, signal.SIGKILL)

    def _kill_all(self) -> None:
        while self._reap():
            self._kill_descendants()
            time.sleep(_KILL_AGAIN_S)

    def _on_signals(self, woken: socket.socket) -> None:
        if set(woken.recv(4096)) - {signal.SIGCHLD}:
            self._end_within(self._order.owner_grace)

    def _on_owner_death(self, source: socket.socket | int) -> None:
        self._selector.unregister(source)
        self._end_within(self._order.owner_grace)

    def _on_orders(self, owner: socket.socket) -> None:
        received = self._receive()
        if received:
            self._handle_orders(received)
        else:
            self._on_owner_death(owner)

    def _receive(self) -> bytes:
        """Return what the owner sent; empty if it has died."""
        try:
            return self._owner.recv(65536)
        except ConnectionError:
            return b""

    def _handle_orders(self, received: bytes) -> None:
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._obey(line.decode(errors="replace").split())

    def _obey(self, words: list[str]) -> None:
        try:
            match words:
                case ["stop", seconds]:
                    self._end_within(float(seconds))
                case ["kill"]:
                    self._end_within(0.0)
                case _:
                    raise ValueError("no such order")
        except ValueError as error:
            print(f"reaper: {words} not understood: {error}", file=sys.stderr, flush=True)

    def _end_within(self, grace: float) -> None:
        """Send SIGTERM and set the deadline in ``grace`` seconds.

        A later call can only bring the deadline forward.
        """
        asks = math.isinf(self._deadline) and grace > 0
        self._deadline = min(self._deadline, time.monotonic() + grace)
        if asks and self._engine is not None and self._engine.returncode is None:
            # Not reaped yet, so the pid is still the engine's.
            os.kill(self._engine.pid, signal.SIGTERM)

    def _report(self, word: str) -> None:
        with contextlib.suppress(OSError):  # the owner may be gone; the reaper continues
            self._owner.sendall(word.encode() + b"\n")


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _die_with(parent: int) -> Callable[[], None]:
    def in_child() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


def _detach() -> None:
    """Leave the owner's process tree, session and group. The launched process exits at once."""
    if os.fork():
        os._exit(0)
    os.setsid()


def parse_order(arguments: list[str]) -> Order:
    options, command = arguments, list[str]()
    if "--" in arguments:
        at = arguments.index("--")
        options, command = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(usage="reaper.py --owner PID:START [options] -- COMMAND...")
    parser.add_argument("--owner", type=Identity.parse, required=True)
    parser.add_argument("--owner-grace", type=float, default=2.0)
    parser.add_argument("--linger", type=float, default=1.0)
    parsed = parser.parse_args(options)
    if not command:
        parser.error("no command after --")
    return Order(command, parsed.owner, parsed.owner_grace, parsed.linger)


def main() -> None:
    order = parse_order(sys.argv[1:])
    _detach()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    Reaper(order, socket.socket(fileno=0)).run()


if __name__ == "__main__":
    main()
