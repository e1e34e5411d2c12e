"""A PostgreSQL server of a test's own: in a temporary folder, on a Unix socket, real."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
from sqlalchemy import URL

_DEBIAN = Path("/usr/lib/postgresql")


def binaries() -> Path | None:
    """The folder of PostgreSQL's server programs, if they are installed."""
    found = sorted(_DEBIAN.glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Postgres:
    """A server that can be killed and started again."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self._programs = programs
        self._server: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._user = _unprivileged() if os.geteuid() == 0 else None
        self.url = URL.create(
            "postgresql+psycopg",
            username="frontline",
            database="postgres",
            query={"host": str(folder)},
        )

    def create(self) -> None:
        """Make the database cluster."""
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._run("initdb", "-D", self._data, "-U", "frontline", "-A", "trust", "-E", "UTF8")

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = ["-D", self._data, "-k", str(self._folder), "-c", "listen_addresses="]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._programs / "postgres", *options],
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self._folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not self._answers():
            log_text = (self._folder / "log").read_text()[-2000:]
            assert self._server.poll() is None, f"PostgreSQL has ended: {log_text}"
            assert time.monotonic() < deadline, f"PostgreSQL does not answer: {log_text}"
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the server and all its processes, as a loss of power would."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None

    def _answers(self) -> bool:
        try:
            with psycopg.connect(
                host=str(self._folder), user="frontline", dbname="postgres", connect_timeout=2
            ):
                return True
        except psycopg.Error:
            return False

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, *arguments],
            check=True,
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run a server, and leave nothing of it behind."""
    programs = binaries()
    assert programs is not None, "PostgreSQL is not installed: apt-get install postgresql"
    # A socket's path is at most 107 bytes, which a test's own folder may be longer than.
    with TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        server = Postgres(Path(folder), programs)
        try:
            server.create()
            server.start()
            yield server
        finally:
            server.kill()
