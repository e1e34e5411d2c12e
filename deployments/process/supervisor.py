"""The owner's side of engine processes: starts and watches them, and ends all descendants.

Linux only. An owner (the Ray actor of an engine replica) starts each engine through
``deployments.process.reaper``, which explains why. What can die, and what cleans up then:

- the engine's main process: the reaper ends its helper processes;
- the owner, for any reason: the reaper ends the engine;
- the reaper: the owner ends what is left, or ``sweep_orphans`` if the owner died as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from app import supervision
from deployments.process import logs, reaper
from deployments.process.reaper import OWNER_MARK, REAPER_MARK, Identity

_FIRST_WORD_S = 60.0
"""Longest wait for the reaper's first report: a Python start on a loaded node, from a slow disk."""
AFTER_KILL_S = 10.0
"""How long a process may take to vanish after SIGKILL: freeing a GPU's memory takes seconds."""
_LOOK_AGAIN_S = 0.02
LOG_PERIOD_S = 10.0
"""Pause between two looks at the size of an engine's log."""


class EngineProcessError(Exception):
    """Base of errors of an engine's process. Subclasses can be pickled, which Ray requires."""


class EngineNotStarted(EngineProcessError):
    """The engine's command could not be run."""


class EngineNotStopped(EngineProcessError):
    """Processes of an engine are left after SIGKILL, because they are stuck in the kernel."""


class _Reins(NamedTuple):
    """The owner's connection to an engine's reaper, the engine's pid, and the reaper's identity."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pid: int
    reaper: Identity


class EngineProcess:
    """One engine with all its descendants. Create it with ``start``, in a running event loop.

    It belongs to that loop. When the loop ends or the owner dies, the engine is ended too.
    """

    def __init__(
        self,
        name: str,
        log_path: Path,
        reins: _Reins,
        stop_grace_s: float,
        log_limit: int,
        temporary: str,
    ) -> None:
        self.name = name
        self._temporary = temporary
        self._log_limit = log_limit
        self.log_path = log_path
        self._reins = reins
        self._stop_grace_s = stop_grace_s
        self._returncode: int | None = None
        self._ended = asyncio.Event()
        self._gone = asyncio.Event()
        self._listening = supervision.run_once("engine process listener", self._listen, about=name)
        self._turning = supervision.keep_running("engine log", self._turn_log, about=name)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        log_dir: Path,
        *,
        name: str,
        stop_grace_s: float = 30.0,
        owner_grace_s: float = 2.0,
        linger_s: float = 1.0,
        keep_logs: int = logs.KEEP_LOGS,
        log_limit: int = logs.LIMIT_BYTES,
    ) -> EngineProcess:
        """Run ``command`` with exactly the environment ``env``, plus the marks of its owner.

        Returns when the command runs; the engine need not be ready then. If the call is cancelled,
        it leaves nothing running.

        Args:
            command: the program and its arguments.
            env: the environment.
            log_dir: the folder of the logs. Every start creates a new file there.
            name: the prefix of the log's name.
            stop_grace_s: the default time of ``stop`` between SIGTERM and SIGKILL.
            owner_grace_s: the same time after the owner has died. It is short, because the next
                replica waits for the GPU.
            linger_s: how long helper processes may outlive the main process, to clean up.
            keep_logs: how many logs of this name are kept, besides those still written to.
            log_limit: the size in bytes from which the log's older part is moved aside.

        Raises:
            EngineNotStarted: the command cannot be run.
            OSError: the log cannot be written.
        """
        log_path, log = logs.open_log(log_dir, name, keep_logs)
        graces = ("--owner-grace", str(owner_grace_s), "--linger", str(linger_s))
        try:
            launcher, ours = _launch_reaper(graces, command, log)
        finally:
            os.close(log)
        # The launcher exits once the reaper has detached. A thread reaps it, also if this call is
        # cancelled.
        asyncio.get_running_loop().run_in_executor(None, launcher.wait)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            writer.write(json.dumps(dict(env)).encode() + b"\n")
            first_word = await _read_first_word(name, reader)
            pid, identity = _parse_first_word(first_word, name, command[0], log_path)
        except BaseException:
            writer.write(b"kill\n")
            writer.close()
            raise
        reins = _Reins(reader, writer, pid, identity)
        temporary = reaper.temporary_folder(env.get("TMPDIR") or "/tmp", identity)
        return cls(name, log_path, reins, stop_grace_s, log_limit, temporary)

    @property
    def pid(self) -> int:
        """The pid of the engine's main process, also after it has ended."""
        return self._reins.pid

    @property
    def returncode(self) -> int | None:
        """The main process's exit status, or minus the signal that ended it; None while it runs."""
        return self._returncode

    @property
    def alive(self) -> bool:
        """Whether the engine's main process runs, according to the reaper's last report."""
        return self._returncode is None

    def tail(self, lines: int = 30) -> str:
        """Return the last lines of the engine's log, long ones cut; empty if there is no log."""
        return logs.tail(self.log_path, lines)

    async def wait(self) -> int:
        """Wait for the end of the main process and return its ``returncode``.

        Helper processes may run for another ``linger_s`` seconds; ``stop`` waits for them as well.
        """
        await self._ended.wait()
        assert self._returncode is not None
        return self._returncode

    async def stop(self, grace_s: float | None = None) -> None:
        """End the engine; return when no process of it is left.

        The main process gets SIGTERM. After ``grace_s`` seconds (at once for 0) every descendant
        gets SIGKILL; processes that clean up after the others get it ``reaper.TIDY_S`` later. It
        may be called at any time and repeatedly: a later call can only bring the end forward.
        Cancelling the call does not cancel the order: the reaper keeps the deadline.

        Raises:
            ValueError: ``grace_s`` is negative or not finite.
            EngineNotStopped: processes are left after SIGKILL.
        """
        grace = self._stop_grace_s if grace_s is None else grace_s
        if not 0 <= grace < math.inf:
            raise ValueError(f"grace_s must be a number of seconds from 0, not {grace}")
        self._order(f"stop {grace}")
        try:
            async with asyncio.timeout(grace + AFTER_KILL_S):
                await self._gone.wait()
        except TimeoutError as error:
            raise EngineNotStopped(f"engine {self.name!r}: processes survive SIGKILL") from error

    def kill(self) -> None:
        """Send SIGKILL to every process of the engine. Returns before they have ended."""
        self._order("kill")

    async def _listen(self) -> None:
        """Handle the reaper's reports until the reaper ends."""
        try:
            with contextlib.suppress(ConnectionError):
                while report := await self._reins.reader.readline():
                    self._handle_report(report.decode().split())
            if not self._gone.is_set():
                await asyncio.to_thread(_kill_marked, _has_reaper(self._reins.reaper))
                await asyncio.to_thread(reaper.remove_folder, self._temporary)
                self._handle_report(["exited", str(-signal.SIGKILL)])
                self._handle_report(["gone"])
        finally:
            self._turning.cancel()
            self._reins.writer.close()  # also when the loop ends first: the reaper sees it

    async def _turn_log(self) -> None:
        while True:
            await asyncio.sleep(LOG_PERIOD_S)
            # Somebody may have removed it.
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(logs.rotate, self.log_path, self._log_limit)

    def _handle_report(self, report: list[str]) -> None:
        match report:
            case ["exited", status] if self._returncode is None:
                self._returncode = int(status)
                self._ended.set()
            case ["gone"]:
                self._gone.set()

    def _order(self, order: str) -> None:
        if not self._gone.is_set() and not self._reins.writer.is_closing():
            self._reins.writer.write(order.encode() + b"\n")


def sweep_orphans() -> list[int]:
    """SIGKILL every engine process of this user whose owner no longer exists; return their pids.

    Called when an owner starts: it ends what is left after both an owner and its reaper were
    killed. It blocks until those processes have ended: some milliseconds if there are none, up to
    ten seconds otherwise. It removes their temporary folders, where those are below this process's
    own. It never touches an engine whose owner lives, nor processes of another
    pid namespace, whose owners' pids have no meaning here.
    """
    killed = _kill_marked(_has_dead_owner)
    _remove_orphaned_folders()
    return killed


def _remove_orphaned_folders() -> None:
    """Remove the temporary folders of engines whose reapers have ended: were killed, that is."""
    parent = tempfile.gettempdir()
    prefix, _, _ = reaper.temporary_folder(parent, Identity(0, 0)).rpartition("-0-0")
    for folder in glob.glob(f"{glob.escape(prefix)}-*-*"):
        try:
            identity = Identity.parse(folder.removeprefix(f"{prefix}-").replace("-", ":"))
        except ValueError:
            # Not ours.
            continue
        if reaper.has_ended(identity):
            reaper.remove_folder(folder)


def _launch_reaper(
    graces: Sequence[str], command: Sequence[str], log: int
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a reaper; return the process that detaches it, and the owner's end of its input."""
    # -I and -S keep the reaper's start independent of the environment and of site-packages.
    program = (sys.executable, "-I", "-S", reaper.__file__)
    owner = ("--owner", str(Identity.of(os.getpid())))
    ours, theirs = socket.socketpair()
    try:
        words = [*program, *owner, *graces, "--", *command]
        return subprocess.Popen(words, stdin=theirs.fileno(), stdout=log, stderr=log), ours
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


async def _read_first_word(name: str, reader: asyncio.StreamReader) -> str:
    try:
        async with asyncio.timeout(_FIRST_WORD_S):
            return (await reader.readline()).decode().strip()
    except TimeoutError as error:
        raise EngineNotStarted(f"engine {name!r}: its reaper does not answer") from error
    except ConnectionError:
        return ""


def _parse_first_word(text: str, name: str, program: str, log_path: Path) -> tuple[int, Identity]:
    """Return the engine's pid and its reaper's identity.

    Raises:
        EngineNotStarted: the command does not run.
    """
    match text.split(" ", 2):
        case ["started", pid, identity]:
            return int(pid), Identity.parse(identity)
        case ["failed", code, reason]:
            if int(code) == errno.ENOENT:
                reason = "it does not exist, or the interpreter it names does not"
            raise EngineNotStarted(f"engine {name!r}: cannot run {program!r}: {reason}")
        case _:
            raise EngineNotStarted(
                f"engine {name!r}: its reaper failed:\n{logs.tail(log_path, 30)}"
            )


# --- killing by mark: what no reaper can do any more ---

Marks = Mapping[str, str]
"""The marks in one process's environment, by name."""


def _has_dead_owner(marks: Marks) -> bool:
    try:
        return reaper.has_ended(Identity.parse(marks[OWNER_MARK]))
    except (KeyError, ValueError, OverflowError):  # no mark, or none of ours
        return False


def _has_reaper(identity: Identity) -> Callable[[Marks], bool]:
    return lambda marks: marks.get(REAPER_MARK) == str(identity)


def _kill_marked(doomed: Callable[[Marks], bool]) -> list[int]:
    """SIGKILL this user's processes with matching marks until none is left or time is up.

    Processes that clean up (``reaper.tidies_up``) come last, if they have not ended by themselves.
    """
    limit = time.monotonic() + AFTER_KILL_S
    tidied_by = time.monotonic() + reaper.TIDY_S
    killed: list[Identity] = []
    while (left := _running(killed, doomed)) and time.monotonic() < limit:
        others = [identity for identity in left if not reaper.tidies_up(identity.pid)]
        if others:
            tidied_by = time.monotonic() + reaper.TIDY_S
        targets = others if time.monotonic() < tidied_by else left
        killed += (it for it in targets if it not in killed and _kill(it))
        time.sleep(_LOOK_AGAIN_S)
    return [identity.pid for identity in killed]


def _running(killed: list[Identity], doomed: Callable[[Marks], bool]) -> list[Identity]:
    """Return the processes that are left, including killed ones that have not ended yet.

    A process that is ending shows no environment, but may still hold a GPU.
    """
    return list({*filter(reaper.is_running, killed), *_marked(doomed)})


def _marked(doomed: Callable[[Marks], bool]) -> list[Identity]:
    found: list[Identity] = []
    for pid in reaper.process_ids():
        stat = reaper.read_stat(pid)
        if stat is not None and pid != os.getpid() and doomed(_read_marks(pid)):
            found.append(stat.identity)
    return found


def _kill(identity: Identity) -> bool:
    return reaper.signal_exactly(identity, signal.SIGKILL)


def _read_marks(pid: int) -> Marks:
    """Return our marks in a process's environment; empty if it is not ours, unreadable or gone."""
    entry = Path("/proc", str(pid))
    try:
        if entry.stat().st_uid != os.geteuid():
            return {}
        if os.readlink(entry / "ns/pid") != os.readlink("/proc/self/ns/pid"):
            return {}
        environment = (entry / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=") for item in environment.split(b"\0"))
    names = (OWNER_MARK.encode(), REAPER_MARK.encode())
    return {
        name.decode(): value.decode(errors="replace") for name, _, value in pairs if name in names
    }
