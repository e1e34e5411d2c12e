"""A store's file that is replaced or deleted under an engine that has it open."""

import os
import shutil
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import event, make_url, text

from app.config.journal import JournalSettings
from app.ledger.ledger import open_ledger
from app.ledger.record_store import RecordStore
from app.store.database import StoreAway, connect
from app.tenants.key_store import KeyStore
from app.tenants.keys import create_key
from tests.support.records import NOON, completed
from tests.support.waiting import until

pytestmark = pytest.mark.unit


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger" / "usage.db"


@pytest.fixture
def engine(path):
    engine = connect(make_url(f"sqlite:///{path}"))
    yield engine
    engine.dispose()


def at(path):
    """What somebody finds who opens the path now."""
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {row[0] for row in database.execute("SELECT request_id FROM usage_records")}


def delete_all(path, backup):
    for side in ("", "-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)


def delete_it_alone(path, backup):
    path.unlink()


def delete_its_folder(path, backup):
    shutil.rmtree(path.parent)


def put_an_empty_one(path, backup):
    path.with_name("new").touch()
    os.replace(path.with_name("new"), path)


def restore(path, backup):
    shutil.copy(backup, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def restore_anew(path, backup):
    delete_all(path, backup)
    restore(path, backup)


def move_aside(path, backup):
    path.rename(path.with_name("before.db"))


EVERY = [delete_all, delete_it_alone, delete_its_folder, put_an_empty_one, restore, restore_anew,
         move_aside]  # fmt: skip


@pytest.fixture
def backup(tmp_path):
    """A copy of the store with one record, and many pages that the store of the test has not."""
    made = tmp_path / "backup.db"
    engine = connect(make_url(f"sqlite:///{made}"))
    store = RecordStore(engine)
    store.prepare()
    store.add([completed(f"old{n:05}").to_json() for n in range(500)])
    engine.dispose()
    return made


@pytest.mark.parametrize("replace", EVERY)
def test_what_is_written_after_is_in_the_file_at_the_path(engine, path, backup, replace):
    store = RecordStore(engine)
    assert store.prepare()
    store.add([completed(f"lost{n}").to_json() for n in range(50)])
    # More connections than one have the old file open, and one is in the middle of reading.
    with engine.connect() as reading, engine.connect():
        reading.execute(text("SELECT 1 FROM usage_records"))
    with engine.connect() as reading:
        rows = reading.execute(text("SELECT request_id FROM usage_records"))
        rows.fetchone()
        replace(path, backup)
        assert store.prepare(), "it is another store"
        store.add([completed("new").to_json()])
        rows.fetchall()
    store.add([completed("newer").to_json()])
    found = at(path)
    assert {"new", "newer"} <= found
    assert len(found) == (502 if replace in (restore, restore_anew) else 2)
    store.prepare()
    assert not store.prepare()


def test_the_log_of_a_file_that_was_moved_aside_is_kept(engine, path, backup):
    store = RecordStore(engine)
    store.prepare()
    with closing(sqlite3.connect(path)) as holding:
        holding.execute("SELECT 1 FROM usage_records").fetchall()
        store.add([completed("before").to_json()])
        move_aside(path, backup)
        store.prepare()
        store.add([completed("after").to_json()])
        assert at(path) == {"after"}
        (log,) = path.parent.glob("*-wal.replaced-*")
        shutil.copy(log, path.with_name("before.db-wal"))
        assert at(path.with_name("before.db")) == {"before"}


def test_a_file_that_is_replaced_before_the_commit_has_not_got_the_records(engine, path):
    store = RecordStore(engine)
    store.prepare()
    store.prepare()

    @event.listens_for(engine, "commit", once=True)
    def replaced(connection):
        delete_all(path, None)

    with pytest.raises(StoreAway, match="replaced"):
        store.add([completed("torn").to_json()])
    assert store.prepare()
    store.add([completed("torn").to_json()])
    assert at(path) == {"torn"}


def test_keys_are_those_of_the_file_at_the_path(engine, path, backup):
    store, keys = RecordStore(engine), KeyStore(engine)
    store.prepare()
    key, _ = create_key("acme", created=NOON)
    keys.add(key)
    assert keys.all() == [key]
    restore(path, backup)
    assert keys.all() == []
    keys.add(key)
    assert keys.all() == [key]


@pytest.mark.parametrize("replace", EVERY)
async def test_what_the_journal_still_holds_is_written_to_the_new_file(
    engine, path, backup, replace, tmp_path
):
    settings = JournalSettings(
        folder=str(tmp_path / "journal"), flush_interval_s=0.02, segment_mb=1
    )
    ledger = open_ledger(engine, settings)
    try:
        await ledger.settle(completed("before"))
        await until(lambda: path.exists() and "before" in moved(engine))
        replace(path, backup)
        # No request has to come for it to be noticed.
        await until(lambda: path.exists() and moved(engine) >= {"before"})
        await ledger.settle(completed("after"))
        await until(lambda: moved(engine) >= {"before", "after"})
    finally:
        await ledger.close()
    assert at(path) >= {"before", "after"}


def moved(engine):
    try:
        with engine.connect() as connection:
            rows = connection.execute(text("SELECT request_id FROM usage_records")).all()
    except Exception:  # between the file and its tables
        return set()
    return {row[0] for row in rows}
