"""The reaper by itself: what it reads in /proc, and its conduct as a process. Linux only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.process import reaper
from deployments.process.reaper import Identity
from tests.support.cluster import eventually

pytestmark = pytest.mark.unit


class Owned:
    """A reaper spoken to directly, with this test as its owner."""

    def __init__(self, log: Path, *command: str, blocked: bool = False) -> None:
        ours, theirs = socket.socketpair()
        program = [sys.executable, "-I", "-S", reaper.__file__]
        options = ["--owner", str(Identity.of(os.getpid())), "--owner-grace", "0.2"]
        mask = {signal.SIGTERM} if blocked else set()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, mask)
        try:
            with theirs, log.open("ab") as output:
                launcher = subprocess.Popen(
                    [*program, *options, "--linger", "0.2", "--", *command],
                    stdin=theirs.fileno(),
                    stdout=output,
                    stderr=output,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.settimeout(5)
        self.socket = ours
        self.words = ours.makefile()
        self.say(json.dumps(dict(os.environ)))
        assert launcher.wait() == 0
        word, pid, identity = self.hear()
        assert word == "started"
        self.engine, self.pid = int(pid), Identity.parse(identity).pid

    def say(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def hear(self) -> list[str]:
        return self.words.readline().split()

    def close(self) -> None:
        self.words.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Owned]:
    with Owned(tmp_path / "log", "sleep", "60") as owned:
        yield owned
    assert_ended(owned.engine, owned.pid)


def assert_ended(*pids: int) -> None:
    def has_ended(pid: int) -> bool:
        stat = reaper.read_stat(pid)
        return stat is None or stat.state in "ZX"

    eventually(lambda: all(map(has_ended, pids)), 5, f"still running: {pids}")


def test_reports_the_end_and_that_nothing_is_left(sleeper: Owned) -> None:
    sleeper.say("stop 5")
    assert sleeper.hear() == ["exited", "-15"]
    assert sleeper.hear() == ["gone"]
    assert sleeper.hear() == []


def test_an_owner_that_closes_the_connection_is_as_good_as_dead(sleeper: Owned) -> None:
    sleeper.close()
    assert_ended(sleeper.engine, sleeper.pid)


def test_sigterm_to_the_reaper_ends_the_engine(sleeper: Owned) -> None:
    os.kill(sleeper.pid, signal.SIGTERM)
    assert sleeper.hear() == ["exited", "-15"]
    assert sleeper.hear() == ["gone"]


@pytest.mark.parametrize("nonsense", ["", "stop", "stop soon", "dance", "stop 1 2", "\x00\x07"])
def test_an_order_not_understood_changes_nothing(sleeper: Owned, nonsense: str) -> None:
    sleeper.say(nonsense)
    sleeper.say("kill")
    assert sleeper.hear()[0] == "exited"


def test_an_order_may_come_in_pieces(sleeper: Owned) -> None:
    for piece in (b"ki", b"ll", b"\n"):
        sleeper.socket.sendall(piece)
        time.sleep(0.02)
    assert sleeper.hear() == ["exited", "-9"]


def test_waits_without_work(sleeper: Owned) -> None:
    def spent() -> tuple[int, int]:
        status = Path(f"/proc/{sleeper.pid}/status").read_text().split()
        ticks = Path(f"/proc/{sleeper.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return int(status[status.index("voluntary_ctxt_switches:") + 1]), sum(map(int, ticks))

    time.sleep(0.1)
    before = spent()
    time.sleep(0.5)
    assert spent() == before


def test_the_engine_does_not_inherit_a_blocked_signal(tmp_path: Path) -> None:
    with Owned(tmp_path / "log", "sleep", "60", blocked=True) as owned:
        owned.say("stop 5")
        assert owned.hear() == ["exited", "-15"]


def test_reaps_orphans_while_the_engine_runs(tmp_path: Path) -> None:
    started = tmp_path / "started"
    fork_twice = f"for i in 1 2 3; do (sleep 0.05 &) ; done; : > {started}; exec sleep 60"
    with Owned(tmp_path / "log", "sh", "-c", fork_twice) as owned:

        def are_reaped() -> bool:
            left = {stat.identity.pid for stat in reaper.descendants(owned.pid)}
            return started.exists() and left == {owned.engine}

        eventually(are_reaped, 5, "orphans are left")
    assert_ended(owned.engine, owned.pid)


def test_a_tree_that_goes_on_forking_is_ended(tmp_path: Path) -> None:
    chain = (
        "import os, time\n"
        "while True:\n"
        "    if os.fork(): time.sleep(0.02); os._exit(0)\n"
        "    os.setsid()"
    )
    main = f"import os, time\nif os.fork(): time.sleep(60)\n{chain}"
    with Owned(tmp_path / "log", sys.executable, "-I", "-S", "-c", main) as owned:
        time.sleep(0.2)
        owned.say("kill")
        assert owned.hear() == ["exited", "-9"]
        assert owned.hear() == ["gone"]
    assert_ended(owned.pid)


def test_usage_errors_are_refused() -> None:
    for arguments in (["--owner", "1:1"], ["--owner", "1:1", "--"], ["--owner", "x", "--", "true"]):
        command = [sys.executable, "-I", "-S", reaper.__file__, *arguments]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_a_command_may_hold_dashes_of_its_own() -> None:
    order = reaper.parse_order(
        ["--owner", "7:9", "--linger", "0.5", "--", "engine", "--", "--owner"]
    )
    assert order == reaper.Order(["engine", "--", "--owner"], Identity(7, 9), 2.0, 0.5)


# --- reading /proc ---


@pytest.mark.parametrize("name", ["a b", ") S 1 (", "x) R 4", "((", "))"])
def test_a_process_name_cannot_mislead(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as child:
        stat = reaper.read_stat(child.pid)
        assert stat is not None
        assert (stat.identity.pid, stat.parent) == (child.pid, os.getpid())
        assert Path(f"/proc/{child.pid}/comm").read_text() == f"{name}\n"
        child.kill()


def test_a_signal_reaches_this_process_and_no_namesake() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        identity = Identity.of(child.pid)
        namesake = Identity(child.pid, identity.start - 1)
        assert not reaper.signal_exactly(namesake, signal.SIGKILL)
        assert not reaper.is_running(namesake)
        assert reaper.has_ended(namesake)
        assert reaper.is_running(identity)
        assert not reaper.has_ended(identity)
        assert reaper.signal_exactly(identity, signal.SIGKILL)
    assert not reaper.signal_exactly(identity, signal.SIGKILL)
    assert not reaper.is_running(identity)
    assert reaper.has_ended(identity)


def test_signals_without_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels before 5.3."""
    monkeypatch.setattr(reaper, "open_pidfd", lambda pid: None)
    with subprocess.Popen(["sleep", "60"]) as child:
        assert reaper.signal_exactly(Identity.of(child.pid), signal.SIGKILL)
        assert child.wait(1) == -signal.SIGKILL


def test_a_vanished_process_has_no_identity() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    assert reaper.read_stat(child.pid) is None
    with pytest.raises(ProcessLookupError):
        Identity.of(child.pid)


def test_an_owner_that_cannot_be_looked_at_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "read_stat", lambda pid: None)
    assert not reaper.has_ended(Identity(os.getpid(), 1))


@given(st.integers(1, 2**22), st.integers(0, 2**63))
def test_an_identity_survives_being_written(pid: int, start: int) -> None:
    assert Identity.parse(str(Identity(pid, start))) == (pid, start)
