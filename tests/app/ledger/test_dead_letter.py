import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from app.cli.main import main
from app.config.journal import JournalSettings
from app.ledger.dead_letter import add_or_set_aside, refused_records, retry_refused
from app.ledger.ledger import Ledger
from app.ledger.record_store import RecordStore, Wanted
from app.store.database import connect
from app.store.database_url import parse_url
from tests.support.records import completed, opened
from tests.support.stores import MemoryStore, adopt

pytestmark = pytest.mark.unit

QUICK = JournalSettings(flush_interval_s=0.02, adopt_interval_s=0.05)


@given(st.lists(st.booleans(), max_size=40))
def test_those_that_are_refused_are_set_aside_and_no_others(tmp_path_factory, refused):
    folder, store = tmp_path_factory.mktemp("journals"), MemoryStore()
    records = [completed() for _ in refused]
    ids = [record.origin.request_id for record in records]
    store.refuses = {one for one, is_refused in zip(ids, refused, strict=True) if is_refused}
    bodies = [record.to_json() for record in records]
    for _ in range(2):
        add_or_set_aside(store, bodies, folder)
    kept = {one.fields["request_id"]: one.body for one in refused_records(folder)}
    assert set(kept) == store.refuses
    assert set(store.records) == set(ids) - store.refuses
    assert all(kept[one] in bodies for one in kept)
    assert retry_refused(store, folder) == 0
    store.refuses = set()
    assert retry_refused(store, folder) == len(kept)
    assert list(refused_records(folder)) == []
    assert (list(store.records.values()) and set(store.records) == set(ids)) or not ids


async def test_one_that_is_refused_does_not_hold_up_those_behind_it(tmp_path, caplog):
    store = MemoryStore()
    store.refuses = {"bad"}
    ledger = Ledger(tmp_path, QUICK, store)
    await ledger.settle(completed("bad"))
    for number in range(10):
        await ledger.settle(completed(f"good-{number}"))
    deadline = time.monotonic() + 10
    while len(store.records) < 10:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert ledger.store_away_s(time.monotonic()) == 0
    await ledger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["refused"]
    assert caplog.text.count("of bad for good") == 1


async def test_a_dead_ingress_may_have_left_one(tmp_path):
    store = MemoryStore()
    store.away = True
    ledger = Ledger(tmp_path, QUICK, store)
    await ledger.open(opened("bad"))
    await ledger.settle(completed("good"))
    await ledger.close()
    store.away, store.refuses = False, {"bad"}
    assert adopt(tmp_path, store) == 2
    assert (set(store.records), adopt(tmp_path, store)) == ({"good"}, 0)
    [kept] = refused_records(tmp_path)
    assert kept.fields["state"] == "interrupted"


def test_what_a_real_database_refuses_is_shown_and_written_later(tmp_path, caplog):
    address = f"sqlite:///{tmp_path}/usage.db"
    engine = connect(parse_url(address))
    store = RecordStore(engine)
    store.prepare()
    good, bad = completed(), completed()
    nameless = bad.to_json().replace(b'"tenant":"acme"', b'"tenant":null')
    add_or_set_aside(store, [nameless, good.to_json()], tmp_path)
    assert list(store.each(Wanted())) == [good]
    assert "NOT NULL constraint failed" in caplog.text
    command = ["ledger", "refused", "--json", "--folder", str(tmp_path), "--ledger", address]
    shown = CliRunner().invoke(main, command)
    assert json.loads(shown.output)["request_id"] == bad.origin.request_id
    assert "NOT NULL" in json.loads(shown.output)["why"]
    table = CliRunner().invoke(main, [word for word in command if word != "--json"])
    assert bad.origin.request_id[:20] in table.output
    [path] = (tmp_path / "refused").iterdir()
    path.write_bytes(path.read_bytes().replace(b'"tenant":null', b'"tenant":"acme"'))
    assert CliRunner().invoke(main, [*command, "--retry"]).exit_code == 0
    assert {record.origin.request_id for record in store.each(Wanted())} == {
        good.origin.request_id,
        bad.origin.request_id,
    }
    assert list((tmp_path / "refused").iterdir()) == []
    engine.dispose()
