"""Run a command and leave nothing of it behind.

    contain.py [--grace SECONDS] COMMAND...

Ray, its workers and the engines are started in sessions of their own, and outlive a parent that is
killed. As child subreaper this process inherits every orphan among its descendants, so that it can
end them all. SIGINT, SIGTERM and SIGHUP become one SIGINT to the command, which then has the grace
to end by itself; a second signal ends everything at once. The exit status is the command's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deployments.process.reaper import descendants, signal_exactly

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TICK_S = 0.2
LINGER_S = 5.0
"""What is left when the command has ended may take this long to follow: Ray's processes do."""
TERM_S = 1.0
"""And this long once it has been asked to."""


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return str(pid)


class Containment:
    """One command and everything that comes from it."""

    def __init__(self, command: Sequence[str], grace: float) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._grace = grace
        self._deadline: float | None = None
        self.status: int | None = None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._on_signal)
        # A session of its own: Ctrl-C reaches the command once, through us, not twice. Should this
        # process be killed, the command is told to end by itself.
        self._main = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGINT),
        )

    @property
    def pid(self) -> int:
        return self._main.pid

    @property
    def stopping(self) -> bool:
        return self._deadline is not None

    def run(self, while_running: Callable[[], None] = lambda: None) -> int:
        """Wait for the command, calling `while_running` at every tick; then end what is left."""
        try:
            while self._reap() and self.status is None:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._end(signal.SIGKILL)
                if not self.stopping:
                    while_running()
                time.sleep(TICK_S)
        finally:
            self._end_what_is_left()
        assert self.status is not None
        return self.status

    def end(self, grace: float) -> None:
        """Send SIGINT to the command, and end everything once the grace has passed."""
        self._deadline = time.monotonic() + grace
        if self.status is None:
            os.kill(self._main.pid, signal.SIGINT)

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        if self._deadline is None:
            self.end(self._grace)
        else:
            self._deadline = 0.0

    def _reap(self) -> bool:
        """Collect all that has ended; whether anything is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self._main.pid:
                    code = os.waitstatus_to_exitcode(status)
                    self.status = self._main.returncode = code if code >= 0 else 128 - code
        except ChildProcessError:
            return False

    def _end_what_is_left(self) -> None:
        patience = time.monotonic() + LINGER_S
        while self._reap() and time.monotonic() < patience and self._deadline != 0.0:
            time.sleep(TICK_S)
        if self._reap():
            names = sorted(process_name(left.identity.pid) for left in descendants(os.getpid()))
            print(f"contain: ending what was left behind: {', '.join(names)}", file=sys.stderr)
            self._end(signal.SIGTERM)
            time.sleep(TERM_S)
        while self._reap():
            self._end(signal.SIGKILL)
            time.sleep(TICK_S)

    def _end(self, signum: int) -> None:
        for process in descendants(os.getpid()):
            signal_exactly(process.identity, signum)


def main() -> None:
    parser = argparse.ArgumentParser(usage="contain.py [--grace SECONDS] COMMAND...")
    parser.add_argument("--grace", type=float, default=60.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    sys.exit(Containment(arguments.command, arguments.grace).run())


if __name__ == "__main__":
    main()
