"""The ledger while processes are killed for real: nothing acknowledged is lost or billed twice.

Short by default; `scripts/test faults` sets FRONTLINE_FAULTS=long, with the counts of
docs/reliability.md.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from threading import Thread

import pytest
from sqlalchemy import make_url

from app.ledger.adoption import Adopter
from app.ledger.record import State
from app.ledger.record_store import RecordStore, Wanted
from app.store.database import connect
from tests.faults.ledger_writer import STEP
from tests.support.waiting import SLOWEST

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
INGRESS_KILLS = 20 if LONG else 5
DATABASE_KILLS = 10 if LONG else 2
# What a stream may generate before what it had generated is written, beside the step: it prints
# 500 tokens a second, and a busy machine may not give the writing thread a turn for a second.
SLACK = 500

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@dataclass
class Told:
    """What the writers have said."""

    opened: set[str] = field(default_factory=set)
    settled: dict[str, Decimal] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    refused: int = 0

    def hear(self, line: str) -> None:
        match line.split():
            case ["open", request_id]:
                self.opened.add(request_id)
            case ["at", request_id, tokens]:
                self.tokens[request_id] = int(tokens)
            case ["settled", request_id, cost]:
                assert request_id not in self.settled
                self.settled[request_id] = Decimal(cost)
            case ["full"]:
                self.refused += 1


@contextmanager
def writer(folder, url, told, max_mb=64):
    """A writer that runs until the block ends, then is killed where it stands."""
    text = url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.ledger_writer", str(folder), text, str(max_mb)],
        stdout=subprocess.PIPE,
        text=True,
    )

    lines = process.stdout
    assert lines is not None

    def listen():
        for line in lines:
            if line.endswith("\n"):
                told.hear(line)

    listener = Thread(target=listen)
    listener.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        listener.join()
        lines.close()


def wait_for_load(told, more=20, timeout_s=30):
    goal, deadline = len(told.settled) + more, time.monotonic() + SLOWEST * timeout_s
    while len(told.settled) < goal:
        assert time.monotonic() < deadline, "the writer does not get on"
        time.sleep(0.01)


def check(folder: Path, url, told: Told, kills: str) -> None:
    """Settle what the last writer left, and compare the store with what was acknowledged."""
    with closing_engine(url) as store:
        store.prepare()
        Adopter(folder, store).adopt(time.monotonic())
        records = {record.origin.request_id: record for record in store.each(Wanted())}
    lost = [i for i, cost in told.settled.items() if i not in records or records[i].cost != cost]
    unsettled = told.opened - set(records)
    interrupted = [r for r in records.values() if r.state is State.INTERRUPTED]
    behind = [
        told.tokens[record.origin.request_id] - record.usage.completion_tokens
        for record in interrupted
        if record.origin.request_id in told.tokens
    ]
    print(
        f"\n{kills}: {len(told.settled)} answers completed, {len(records)} records, "
        f"{len(interrupted)} interrupted, at most {max(behind, default=0)} tokens behind; "
        f"differences: {len(lost) + len(unsettled)}"
    )
    assert (lost, unsettled) == ([], set())
    assert all(tokens <= STEP + SLACK for tokens in behind)
    assert not [path for path in folder.iterdir() if not path.name.startswith(".new-")]
    bill = sum((r.cost for i, r in records.items() if i in told.settled), start=Decimal(0))
    assert bill == sum(told.settled.values(), start=Decimal(0))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return make_url(f"sqlite:///{tmp_path}/usage.db")
    return request.getfixturevalue("postgres").url


def test_an_ingress_is_killed_again_and_again(tmp_path, url):
    folder, told = tmp_path / "journal", Told()
    for _ in range(INGRESS_KILLS):
        with writer(folder, url, told):
            wait_for_load(told)
            time.sleep(random.random())
    assert len(told.opened) > len(told.settled) / 100
    check(folder, url, told, f"{INGRESS_KILLS} kills of the ingress on {url.get_backend_name()}")


def test_two_ingresses_settle_for_each_other(tmp_path, url):
    folder, told, other = tmp_path / "journal", Told(), Told()
    with writer(folder, url, other):
        for _ in range(max(INGRESS_KILLS // 2, 2)):
            with writer(folder, url, told):
                wait_for_load(told)
                time.sleep(random.random() / 2)
        # The living one settles what the dead ones left, without being told.
        with closing_engine(url) as store:
            deadline = time.monotonic() + 30
            while told.opened - {r.origin.request_id for r in store.each(Wanted())}:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    told.opened |= other.opened
    told.settled |= other.settled
    told.tokens |= other.tokens
    check(folder, url, told, f"one of two ingresses killed, on {url.get_backend_name()}")


@contextmanager
def closing_engine(url):
    engine = connect(url)
    try:
        yield RecordStore(engine)
    finally:
        engine.dispose()


def test_the_database_is_killed_again_and_again(tmp_path, postgres):
    folder, told = tmp_path / "journal", Told()
    with writer(folder, postgres.url, told):
        wait_for_load(told)
        for _ in range(DATABASE_KILLS):
            postgres.kill()
            wait_for_load(told, more=50)
            time.sleep(random.random())
            postgres.start()
            # Killed again only when it has got what was kept meanwhile.
            wait_for_store(postgres.url, set(told.settled))
    check(folder, postgres.url, told, f"{DATABASE_KILLS} kills of PostgreSQL")


def wait_for_store(url, request_ids, timeout_s=30):
    deadline = time.monotonic() + SLOWEST * timeout_s
    with closing_engine(url) as store:
        store.prepare()
        while request_ids - {record.origin.request_id for record in store.each(Wanted())}:
            assert time.monotonic() < deadline, "the store was not caught up with"
            time.sleep(0.1)


def test_both_are_killed_at_once(tmp_path, postgres):
    folder, told = tmp_path / "journal", Told()
    for _ in range(DATABASE_KILLS):
        with writer(folder, postgres.url, told):
            wait_for_load(told)
            postgres.kill()
            wait_for_load(told)
        postgres.start()
    check(folder, postgres.url, told, f"{DATABASE_KILLS} kills of PostgreSQL and the ingress")


def test_a_locked_sqlite_file_stops_nobody(tmp_path):
    url = make_url(f"sqlite:///{tmp_path}/usage.db")
    folder, told = tmp_path / "journal", Told()
    with writer(folder, url, told):
        wait_for_load(told)
        engine = connect(url)
        with closing(engine.raw_connection()) as holder:
            holder.cursor().execute("BEGIN EXCLUSIVE")
            wait_for_load(told, more=300)
            holder.rollback()
        engine.dispose()
    check(folder, url, told, "SQLite's file locked by somebody else")


@contextmanager
def small_disk(folder, size):
    """A file system of so many bytes; mounting one needs root."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: NOT TESTED ({mounted.stderr.decode()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def wait_refused(told, many):
    deadline = time.monotonic() + 120
    while told.refused < many:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_full_disk_refuses_and_recovers(tmp_path, postgres):
    told = Told()
    with small_disk(tmp_path / "disk", "6m") as disk:
        folder = disk / "journal"
        with writer(folder, postgres.url, told, max_mb=64):
            wait_for_load(told)
            postgres.kill()
            wait_refused(told, 50)
            served = len(told.settled)
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
            assert shutil.disk_usage(disk).free == 0
            wait_refused(told, told.refused + 50)
            # Space comes back from the journal alone.
            postgres.start()
            wait_for_load(told, more=100)
        assert served > 500
        check(folder, postgres.url, told, f"disk full, {told.refused} refused")


def test_a_full_journal_refuses_and_recovers(tmp_path, postgres):
    folder, told = tmp_path / "journal", Told()
    with writer(folder, postgres.url, told, max_mb=8):
        wait_for_load(told)
        postgres.kill()
        wait_refused(told, 50)
        served = len(told.settled)
        postgres.start()
        wait_for_load(told, more=100)
    assert served > 1000
    check(folder, postgres.url, told, f"journal full, {told.refused} refused")
