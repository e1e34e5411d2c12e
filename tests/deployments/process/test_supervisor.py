"""Engine processes, with real processes and real kills. Linux only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deployments.process import reaper, supervisor
from deployments.process.logs import OLDER
from deployments.process.reaper import Identity
from deployments.process.supervisor import (
    EngineNotStarted,
    EngineNotStopped,
    EngineProcess,
    sweep_orphans,
)

pytestmark = pytest.mark.unit

ROOT = Path(supervisor.__file__).parents[2]
PYTHON = (sys.executable, "-I", "-S", "-c")

# Forks a helper in its own group and a grandchild in a session of its own, all deaf to SIGTERM.
# Each writes its pid to the file named by its argument, the main process last.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def write():
    with open(sys.argv[1], "a") as file: file.write(f"{os.getpid()}\\n")
def rest():
    write()
    while True: time.sleep(60)
ready, told = os.pipe()
if not os.fork():
    if not os.fork():
        os.setsid()
        os.write(told, b"1")
        rest()
    os.write(told, b"1")
    rest()
os.read(ready, 1); os.read(ready, 1)
time.sleep(0.05)
rest()
"""

POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("up", flush=True)
while True: time.sleep(60)
"""

# Two processes with shared memory, which the tracker unlinks when the last of them has ended.
SHARING = """
import os, signal, sys, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=4096)
if os.fork(): print("/dev/shm/" + memory.name, flush=True)
time.sleep(60)
"""

# Its helper looks like a tracker, but never ends by itself.
LINGERING = """
import os, sys, time
if not os.fork():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    name = "from multiprocessing.resource_tracker import main"
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code, name])
time.sleep(60)
"""

# Owns one engine until it is killed: python OWNER pids-file log-dir, prints {"engine", "reaper"}.
OWNER = """
import asyncio, json, os, sys
from pathlib import Path
import psutil
from deployments.process.supervisor import EngineProcess

async def own():
    engine = await EngineProcess.start(
        json.loads(sys.argv[1]), dict(os.environ), Path(sys.argv[2]), name="owned",
        owner_grace_s=0.2, linger_s=0.2,
    )
    if "fork" in sys.argv and not os.fork():
        os.execvp("sleep", ["sleep", "60"]) if "exec" in sys.argv else signal_pause()
    above = psutil.Process(engine.pid).ppid()
    print(json.dumps({"engine": engine.pid, "reaper": above}), flush=True)
    await engine.wait()

def signal_pause():
    import signal
    while True: signal.pause()

asyncio.run(own())
"""


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill what a test left, whether it passed or not: everything started carries a variable."""
    run = uuid.uuid4().hex
    monkeypatch.setenv("TEST_RUN", run)
    yield
    while left := carriers(run):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def carriers(run: str) -> list[int]:
    """Every process started by this test, however indirectly."""
    found = []
    for pid in reaper.process_ids():
        with contextlib.suppress(OSError):
            if f"TEST_RUN={run}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


def running(pid: int) -> bool:
    stat = reaper.read_stat(pid)
    return stat is not None and stat.state not in "ZX"


async def eventually(condition: Callable[[], bool], within: float = 5.0) -> bool:
    """Whether the condition came true in time, asked in a thread."""

    def ask() -> bool:
        deadline = time.monotonic() + within
        while not (true := condition()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return true

    return await asyncio.to_thread(ask)


async def still_running(*pids: int, within: float = 5.0) -> list[int]:
    """Those of the processes that have not ended when time is up."""
    await eventually(lambda: not any(map(running, pids)), within)
    return [pid for pid in pids if running(pid)]


def read_pids(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


async def written_pids(path: Path, count: int = 3) -> list[int]:
    """The pids of a stubborn engine's processes, its main process last."""
    assert await eventually(lambda: len(read_pids(path)) == count)
    return read_pids(path)


async def start(logs: Path, program: str, *arguments: str, **options: float) -> EngineProcess:
    command = [*PYTHON, program, *arguments]
    options = {"linger_s": 0.3, "owner_grace_s": 0.2} | options
    return await EngineProcess.start(command, dict(os.environ), logs, name="engine", **options)


async def start_stubborn(logs: Path, pids: Path) -> tuple[EngineProcess, list[int]]:
    engine = await start(logs, STUBBORN, str(pids))
    return engine, await written_pids(pids)


async def until_log(engine: EngineProcess, text: str) -> None:
    assert await eventually(lambda: text in engine.tail()), engine.tail()


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def reaper_of(engine: EngineProcess) -> int:
    """The pid of its reaper, which is the parent of the main process while that runs."""
    return psutil.Process(engine.pid).ppid()


class Owner:
    """Another process that owns a stubborn engine, to be killed."""

    def __init__(self, pids: Path, logs: Path, *extra: str) -> None:
        command = json.dumps([*PYTHON, STUBBORN, str(pids)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, command, str(logs), *extra],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        with self.process.stdout as output:
            words = json.loads(output.readline())
        self.reaper: int = words["reaper"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


# --- start, end and what is said of them ---


async def test_runs_the_command_and_reports_its_own_pid(logs: Path) -> None:
    engine = await start(logs, POLITE)
    await until_log(engine, "up")
    assert engine.alive
    assert engine.returncode is None
    assert POLITE in command_line(engine.pid)
    await engine.stop(5)
    assert not running(engine.pid)


async def test_gives_exactly_the_environment_and_the_marks(logs: Path) -> None:
    program = "import os, json; print(json.dumps(dict(os.environ)))"
    env = {"TEST_RUN": os.environ["TEST_RUN"], "WIDE": "é\udcff", "LC_ALL": "C.UTF-8"}
    engine = await EngineProcess.start([*PYTHON, program], env, logs, name="engine")
    await engine.wait()
    seen = json.loads(engine.tail())
    assert env.items() <= seen.items()
    marks = {"FRONTLINE_OWNER", "FRONTLINE_REAPER", "SPT_NOENV"}
    assert seen.keys() - env.keys() == marks | {"TMPDIR"}
    assert seen["FRONTLINE_OWNER"] == str(Identity.of(os.getpid()))


async def test_has_no_input_and_holds_nothing_but_its_log(logs: Path) -> None:
    program = (
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    try: print(fd, os.readlink('/proc/self/fd/' + fd))\n"
        "    except OSError: pass"
    )
    engine = await start(logs, program)
    await engine.wait()
    held = dict(line.split() for line in engine.tail().splitlines())
    assert held == {"0": "/dev/null", "1": str(engine.log_path), "2": str(engine.log_path)}


async def test_is_no_child_of_its_owner_for_ray_kills_those(logs: Path) -> None:
    engine = await start(logs, POLITE)
    below = {stat.identity.pid for stat in reaper.descendants(os.getpid())}
    assert not below & {engine.pid, reaper_of(engine)}
    assert os.getsid(engine.pid) == engine.pid
    assert os.getsid(reaper_of(engine)) not in {os.getsid(0), engine.pid}
    engine.kill()


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("print('bad weights'); raise SystemExit(3)", 3),
        ("import os; print('bad weights', flush=True); os.kill(os.getpid(), 9)", -9),
    ],
)
async def test_an_end_is_told_with_the_last_log_lines(
    logs: Path, program: str, status: int
) -> None:
    engine = await start(logs, program)
    assert await engine.wait() == status
    assert not engine.alive
    assert engine.returncode == status
    assert "bad weights" in engine.tail()


async def test_a_command_that_does_not_exist(logs: Path) -> None:
    with pytest.raises(EngineNotStarted, match="cannot run '/no/such/engine': it does not exist"):
        await EngineProcess.start(["/no/such/engine"], {}, logs, name="engine")


async def test_a_command_that_may_not_be_run(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineNotStarted, match=r"cannot run .*: Permission denied"):
        await EngineProcess.start([str(tmp_path)], {}, logs, name="engine")


async def test_a_reaper_that_fails_is_told_with_its_words(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such kernel')")
    monkeypatch.setattr(reaper, "__file__", str(broken))
    with pytest.raises(EngineNotStarted, match="no such kernel"):
        await start(logs, POLITE)


async def test_a_cancelled_start_leaves_nothing(logs: Path, tmp_path: Path) -> None:
    for delay in (0.0, 0.005, 0.02, 0.04):
        starting = asyncio.create_task(start(logs, STUBBORN, str(tmp_path / "pids")))
        await asyncio.sleep(delay)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await starting).kill()
    run = os.environ["TEST_RUN"]
    assert await eventually(lambda: not carriers(run))


# --- stop and kill ---


async def test_stop_lets_the_engine_end_by_itself(logs: Path) -> None:
    engine = await start(logs, POLITE)
    await until_log(engine, "up")
    began = time.monotonic()
    await engine.stop(20)
    assert time.monotonic() - began < 2
    assert engine.returncode == 0


async def test_stop_kills_the_whole_tree_at_the_deadline(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    above = reaper_of(engine)
    began = time.monotonic()
    stopping = asyncio.create_task(engine.stop(0.3))
    await asyncio.sleep(0.2)
    assert all(map(running, pids))
    await stopping
    assert 0.3 <= time.monotonic() - began < 2
    assert not any(map(running, pids))
    assert engine.returncode == -signal.SIGKILL
    assert await still_running(above) == []


async def test_stop_again_brings_the_end_forward_and_never_back(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    began = time.monotonic()
    patient = asyncio.create_task(engine.stop(60))
    await asyncio.sleep(0.05)
    await asyncio.gather(engine.stop(0.1), engine.stop(30), patient)
    assert time.monotonic() - began < 5
    assert not any(map(running, pids))
    await engine.stop()
    engine.kill()


async def test_a_cancelled_stop_still_stops(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    stopping = asyncio.create_task(engine.stop(0.3))
    await asyncio.sleep(0.05)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await still_running(*pids) == []
    await engine.stop()


async def test_stop_allows_the_grace_given_at_start(logs: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    engine = await start(logs, STUBBORN, str(pids), stop_grace_s=0.1)
    await written_pids(pids)
    began = time.monotonic()
    await engine.stop()
    assert 0.1 <= time.monotonic() - began < 3


@pytest.mark.parametrize("grace", [-1.0, math.nan, math.inf])
async def test_stop_refuses_a_grace_that_is_none(logs: Path, grace: float) -> None:
    engine = await start(logs, POLITE)
    with pytest.raises(ValueError, match="grace_s"):
        await engine.stop(grace)
    assert engine.alive
    await engine.stop(0)


async def test_stop_tells_when_something_survives(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    monkeypatch.setattr(supervisor, "AFTER_KILL_S", 0.1)
    above = reaper_of(engine)
    os.kill(above, signal.SIGSTOP)  # nobody is there to kill
    with pytest.raises(EngineNotStopped, match="'engine'"):
        await engine.stop(0)
    os.kill(above, signal.SIGCONT)
    assert await still_running(*pids) == []


async def test_kill_ends_the_tree_at_once(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    engine.kill()
    assert await engine.wait() == -signal.SIGKILL
    assert await still_running(*pids, within=2) == []


async def test_a_stopped_process_is_killed_too(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    os.kill(engine.pid, signal.SIGSTOP)
    await engine.stop(0.1)
    assert not any(map(running, pids))


# --- something dies ---


async def test_helpers_do_not_outlive_a_killed_engine(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    os.kill(engine.pid, signal.SIGKILL)
    assert await engine.wait() == -signal.SIGKILL
    assert await still_running(*pids, within=2) == []


async def test_helpers_have_a_moment_to_tidy_up(logs: Path, tmp_path: Path) -> None:
    tidied = tmp_path / "tidied"
    program = (
        "import os, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "time.sleep(3); open(sys.argv[1], 'w').close()"
    )
    engine = await start(logs, program, str(tidied), linger_s=20)
    began = time.monotonic()
    await engine.wait()
    assert time.monotonic() - began < 2.5
    await engine.stop()
    assert tidied.exists()


async def test_nothing_outlives_a_killed_owner(logs: Path, tmp_path: Path) -> None:
    owner = Owner(tmp_path / "pids", logs)
    pids = await written_pids(tmp_path / "pids")
    owner.kill()
    assert await still_running(*pids, owner.reaper) == []


async def test_nothing_outlives_an_owner_whose_children_are_killed_first(
    logs: Path, tmp_path: Path
) -> None:
    """What Ray does to an actor that it ends."""
    owner = Owner(tmp_path / "pids", logs)
    pids = await written_pids(tmp_path / "pids")
    for stat in reaper.descendants(owner.process.pid):
        os.kill(stat.identity.pid, signal.SIGKILL)
    owner.kill()
    assert await still_running(*pids, owner.reaper) == []


async def test_nothing_outlives_an_owner_whose_socket_a_child_holds(
    logs: Path, tmp_path: Path
) -> None:
    owner = Owner(tmp_path / "pids", logs, "fork")
    pids = await written_pids(tmp_path / "pids")
    owner.kill()
    assert await still_running(*pids, owner.reaper) == []


async def test_nothing_outlives_the_event_loop(logs: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def forget() -> None:
        await start_stubborn(logs, pids)

    await asyncio.to_thread(asyncio.run, forget())
    assert await still_running(*await written_pids(pids)) == []


async def test_the_owner_ends_what_a_killed_reaper_left(logs: Path, tmp_path: Path) -> None:
    engine, pids = await start_stubborn(logs, tmp_path / "pids")
    os.kill(reaper_of(engine), signal.SIGKILL)
    assert await engine.wait() == -signal.SIGKILL
    await engine.stop()
    assert not any(map(running, pids))


async def test_a_sweep_ends_what_a_killed_owner_and_reaper_left(logs: Path, tmp_path: Path) -> None:
    ours, our_pids = await start_stubborn(logs, tmp_path / "ours")
    owner = Owner(tmp_path / "pids", logs)
    pids = await written_pids(tmp_path / "pids")
    assert set(sweep_orphans()).isdisjoint(pids)
    os.kill(owner.process.pid, signal.SIGSTOP)  # it must not clean up between the two
    os.kill(owner.reaper, signal.SIGKILL)
    owner.kill()
    assert await still_running(pids[-1]) == []  # the main supervisor, by PDEATHSIG
    sweep_orphans()  # what it returns depends on whoever else sweeps this machine just now
    assert not any(map(running, pids))
    assert all(map(running, our_pids))
    ours.kill()


@pytest.mark.parametrize("victim", ["main", "tree", "reaper"])
async def test_no_shared_memory_is_left(logs: Path, victim: str) -> None:
    engine = await start(logs, SHARING)
    await until_log(engine, "/dev/shm/")
    memory = Path(engine.tail(1))
    assert exists(memory)
    if victim == "tree":
        engine.kill()
    else:
        os.kill({"main": engine.pid, "reaper": reaper_of(engine)}[victim], signal.SIGKILL)
    await engine.wait()
    await engine.stop()
    assert not exists(memory)


def exists(path: Path) -> bool:
    return path.exists()


@pytest.mark.parametrize("victim", ["tree", "reaper"])
async def test_a_tracker_that_does_not_end_is_killed_last(logs: Path, victim: str) -> None:
    engine = await start(logs, LINGERING)
    assert await eventually(lambda: engine.tail().isdecimal())
    tracker = int(engine.tail())
    engine.kill() if victim == "tree" else os.kill(reaper_of(engine), signal.SIGKILL)
    assert await still_running(engine.pid, within=0.5) == []
    assert running(tracker)
    await engine.stop()
    assert not running(tracker)


# --- whom a sweep takes ---


class Marked:
    """Starts processes with an owner's mark that no sweep but this test's knows."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.started: list[subprocess.Popen[bytes]] = []

    def __call__(self, owner: Identity | str, *command: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, self._name: str(owner)}
        self.started.append(subprocess.Popen(command or ("sleep", "60"), env=env))
        return self.started[-1]


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    name = f"TEST_OWNER_{uuid.uuid4().hex}"
    monkeypatch.setattr(supervisor, "OWNER_MARK", name)
    marked = Marked(name)
    yield marked
    for child in marked.started:
        child.kill()
        child.wait()


def test_a_sweep_takes_those_whose_owner_is_gone_or_has_another_start_time(marked: Marked) -> None:
    me = Identity.of(os.getpid())
    with subprocess.Popen(["sleep", "0"]) as owner:
        gone = Identity.of(owner.pid)
    orphans = [marked(gone), marked(Identity(me.pid, me.start - 1))]
    marked(me)
    assert set(sweep_orphans()) == {orphan.pid for orphan in orphans}
    assert [orphan.wait(1) for orphan in orphans] == [-signal.SIGKILL] * 2
    assert sweep_orphans() == []


def test_a_sweep_counts_an_owner_that_waits_to_be_reaped_as_gone(marked: Marked) -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        orphan = marked(Identity.of(owner.pid))
        assert sweep_orphans() == []
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        assert sweep_orphans() == [orphan.pid]


@pytest.mark.parametrize("mark", ["", "1", "x:y", "1:2:3", "-1:1", f"{2**80}:1", "own"])
def test_a_sweep_leaves_those_with_a_living_owner_or_an_unreadable_mark(
    marked: Marked, mark: str
) -> None:
    child = marked(Identity.of(os.getpid()) if mark == "own" else mark)
    assert sweep_orphans() == []
    assert child.poll() is None


def test_a_sweep_leaves_other_pid_namespaces_alone(marked: Marked) -> None:
    """Their owners' pids mean nothing here. Needs root, as most containers have."""
    outer = marked("999999999:1", "unshare", "--pid", "--fork", "sleep", "60")
    deadline = time.monotonic() + 3
    while not (inner := reaper.descendants(outer.pid)):
        if outer.poll() is not None or time.monotonic() > deadline:
            pytest.skip("cannot make a pid namespace")
        time.sleep(0.01)
    assert sweep_orphans() == [outer.pid]
    assert running(inner[0].identity.pid)


# --- the temporary folder ---

# Leaves a file and a folder that cannot be read behind, prints its folder, and waits.
LITTERING = """
import os, sys, time
folder = os.environ["TMPDIR"]
open(folder + "/socket", "w").close()
os.makedirs(folder + "/locked/inside")
os.chmod(folder + "/locked", 0)
print(folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("victim", ["none", "main", "tree", "reaper"])
async def test_an_engines_temporary_folder_goes_with_it(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """410afd7: all engines shared the machine's, and what they left there stayed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    engine = await start(logs, LITTERING)
    await until_log(engine, "frontline-")
    folder = Path(engine.tail(1))
    assert folder.parent == tmp_path and os.stat(folder).st_mode & 0o777 == 0o700
    if victim == "tree":
        engine.kill()
    elif victim != "none":
        os.kill({"main": engine.pid, "reaper": reaper_of(engine)}[victim], signal.SIGKILL)
        await engine.wait()
    await engine.stop(0)
    assert await eventually(lambda: not exists(folder))


async def test_a_sweep_takes_the_folders_of_engines_that_are_gone(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    ours = await start(logs, LITTERING)
    await until_log(ours, "frontline-")
    gone = reaper.temporary_folder(str(tmp_path), Identity(2**22 + 1, 7))
    others = [tmp_path / "frontline-1-2-3", tmp_path / "frontline-x", tmp_path / "notes"]
    for folder in (Path(gone), *others):
        folder.mkdir()
    sweep_orphans()
    assert not exists(Path(gone))
    assert all(map(exists, [Path(ours.tail(1)), *others])), "of another namespace, and not ours"
    await ours.stop(0)


async def test_an_engine_starts_where_no_folder_can_be_made(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    engine = await start(logs, "import os; print(os.environ['TMPDIR'])")
    await engine.wait()
    assert engine.tail(1) == "/no/such/folder"
    assert "has no temporary folder of its own" in engine.tail()


# --- logs ---


def files(folder: Path) -> set[Path]:
    return set(folder.iterdir())


def make_files(folder: Path, *names: str) -> list[Path]:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


async def test_the_newest_logs_of_a_name_are_kept(logs: Path) -> None:
    old = [f"engine-20200101T00000{n}.000000Z.log" for n in range(5)]
    others = ["engine-2-20200101T000000.000000Z.log", "notes.log"]
    *_, fourth, fifth, namesake, notes = make_files(logs, *old, *others)
    engine = await start(logs, "pass", keep_logs=3)
    await engine.wait()
    assert files(logs) == {fourth, fifth, namesake, notes, engine.log_path}


async def test_the_log_of_a_living_engine_is_kept(logs: Path) -> None:
    engine = await start(logs, POLITE)
    for _ in range(2):
        last = await start(logs, POLITE, keep_logs=1)
        above = reaper_of(last)
        await last.stop()
        assert await still_running(above) == []
    assert files(logs) == {engine.log_path, last.log_path}
    await engine.stop(5)


async def test_a_log_that_grows_is_turned_while_the_engine_runs(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """410afd7: it grew until the disk was full."""
    monkeypatch.setattr(supervisor, "LOG_PERIOD_S", 0.05)
    program = "import time\nwhile True: print('x' * 999, flush=True); time.sleep(0.002)"
    engine = await start(logs, program, log_limit=20_000)
    older = engine.log_path.with_name(engine.log_path.name + OLDER)
    assert await eventually(older.exists)
    first = older.stat().st_ino
    assert await eventually(lambda: older.stat().st_ino != first)
    await engine.stop(0)
    assert sum(path.stat().st_size for path in files(logs)) < 400_000
    assert engine.tail(1).startswith("x")


async def test_a_name_may_hold_what_a_file_name_may_not(logs: Path) -> None:
    engine = await EngineProcess.start(["true"], dict(os.environ), logs, name="org/model: 7")
    await engine.wait()
    assert engine.log_path.parent == logs
    assert engine.log_path.name.startswith("org-model-7-")
    assert engine.log_path.stat().st_mode & 0o777 == 0o600


async def test_tail_is_readable_whatever_was_written(logs: Path) -> None:
    engine = await start(logs, "pass")
    await engine.wait()
    lines = [b"first", b"\xff\xfe", b"\x1b[31mred\x1b[0m", b"10%\r50%\r100%", b"x" * 5000, b"last"]
    engine.log_path.write_bytes(b"\n".join(lines) + b"\n")
    assert engine.tail(5).split("\n") == ["��", "red", "100%", "x" * 500 + "…", "last"]
    assert engine.tail(0) == ""
    engine.log_path.unlink()
    assert engine.tail() == ""
