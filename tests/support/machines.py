"""Machines of one cluster on this one: each with its own network, processes and temporary files.

Linux namespaces, below a user namespace that any user may make: a machine has its own loopback,
where nobody else gets in, its own address on a network of their own, its own process ids, and its
own folders for what Ray and its HAProxy keep in /tmp. Killing its first process kills all of it.
Nothing here can be reached from outside, nor reaches anything there, but for Unix sockets through
which a test speaks to the machines' HTTP ports.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.waiting import SLOWEST

NETWORK = "10.99.0"
HTTP_PORT = 8000
_ROOT = Path(__file__).parents[2]
_UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")
# Prints a line once the folders are in place, and is there until its input ends, as it does when
# the test's process dies, however it dies.
_FIRST = 'for pair; do mount --bind "${pair%%:*}" "${pair#*:}" || exit 1; done; echo; exec cat'
_AS_ROOT_OF_ITS_OWN = ("--user", "--map-root-user")


def namespaces_work() -> bool:
    """Whether users of this machine may make namespaces."""
    command = [_UNSHARE[0], *_AS_ROOT_OF_ITS_OWN, *_UNSHARE[1:], "ip", "link", "show", "lo"]
    try:
        return subprocess.run(command, capture_output=True, timeout=SLOWEST * 10).returncode == 0
    except OSError:
        return False


class Machine:
    """One machine. ``Machines.add`` makes it."""

    def __init__(self, address: str, first: subprocess.Popen[str], folder: Path) -> None:
        self.address = address
        self.folder = folder
        self._first = first
        self.pid = _innermost(first)

    def run(self, *command: str, timeout_s: float = 60, **env: str) -> str:
        """Run a command there to its end, and return what it printed."""
        done = subprocess.run(
            [*_enter(self.pid), *command],
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SLOWEST * timeout_s,
        )
        assert done.returncode == 0, f"{command} on {self.address}: {done.stdout}"
        return done.stdout

    @property
    def alive(self) -> bool:
        """Whether it has not been killed."""
        return self._first.poll() is None

    def kill(self) -> None:
        """Pull the plug, and wait until nothing of it runs."""
        _end(self._first)


class Machines:
    """The machines of one cluster and the network between them. Made by ``machines``."""

    def __init__(self, folder: Path, own_folders: tuple[str, ...]) -> None:
        """Every machine has its own of ``own_folders``, which are absolute paths."""
        self.folder = folder
        self._own_folders = own_folders
        command = [_UNSHARE[0], *_AS_ROOT_OF_ITS_OWN, *_UNSHARE[1:]]
        self._hub = _begin(command)
        self._hub_pid = _innermost(self._hub)
        self._ip("link", "add", "bridge", "type", "bridge")
        self._ip("link", "set", "bridge", "up")
        self._ip("address", "add", f"{NETWORK}.254/24", "dev", "bridge")
        self.all: list[Machine] = []

    def add(self, number: int) -> Machine:
        """Start a machine with the address of this number, or one in place of a killed one."""
        mounts = [self._own_folder(number, path) for path in self._own_folders]
        first = _begin([*_enter(self._hub_pid), *_UNSHARE], *mounts)
        machine = Machine(f"{NETWORK}.{number}", first, self.folder)
        self.all.append(machine)
        name = f"m{number}-{len(self.all)}"
        peer = ("peer", "name", "eth0", "netns", str(machine.pid))
        self._ip("link", "add", name, "type", "veth", *peer)
        self._ip("link", "set", name, "master", "bridge", "up")
        for words in (
            ("address", "add", f"{machine.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", f"{NETWORK}.254"),
        ):
            machine.run("ip", *words)
        return machine

    def open_window(self, machine: Machine) -> str:
        """Return a Unix socket that leads to a machine's HTTP port."""
        path = self.folder / f"{machine.address}.sock"
        config = self.folder / f"{machine.address}.cfg"
        config.write_text(
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
            f"listen window\n bind unix@{path}\n server machine {machine.address}:{HTTP_PORT}\n"
        )
        haproxy = (os.environ["FRONTLINE_HAPROXY"], "-dS", "-D", "-f", str(config))
        subprocess.run([*_enter(self._hub_pid), *haproxy], check=True)
        return str(path)

    def close(self) -> None:
        """Kill everything."""
        for machine in self.all:
            machine.kill()
        _end(self._hub)

    def _own_folder(self, number: int, path: str) -> str:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        own = self.folder / f"{NETWORK}.{number}{path}"
        own.mkdir(parents=True, exist_ok=True)
        return f"{own}:{path}"

    def _ip(self, *words: str) -> None:
        # In the hub's network, but with this machine's process ids.
        enter = (
            "nsenter",
            f"--target={self._hub_pid}",
            "--user",
            "--net",
            "--preserve-credentials",
        )
        subprocess.run([*enter, "ip", *words], check=True)


@contextmanager
def machines(folder: Path, *own_folders: str) -> Iterator[Machines]:
    """A network for machines; nothing is left of it afterwards."""
    network = Machines(folder, own_folders)
    try:
        yield network
    finally:
        network.close()


def _begin(command: list[str], *mounts: str) -> subprocess.Popen[str]:
    shell = ("sh", "-c", _FIRST, "sh", *mounts)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen([*command, *shell], **pipes, text=True)
    assert first.stdout is not None
    if not first.stdout.readline():
        first.kill()
        raise OSError(f"no machine: {command} failed")
    return first


def _end(first: subprocess.Popen[str]) -> None:
    first.communicate(timeout=SLOWEST * 20)  # closes its input first


def _innermost(process: subprocess.Popen[str]) -> int:
    below = psutil.Process(process.pid)
    while children := below.children():
        below = children[-1]
    return below.pid


def _enter(pid: int) -> list[str]:
    spaces = ("--user", "--net", "--pid", "--mount", "--preserve-credentials")
    return ["nsenter", f"--target={pid}", *spaces, f"--wd={_ROOT}", "--"]
