import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, MetaData, Table, insert, inspect, make_url, text

from app.core.pricing import RateCard, TokenUsage
from app.ledger.record import PRICES, USED
from app.ledger.record_store import RecordStore, Wanted
from app.ledger.usage import add_up
from app.store import migrations
from app.store.database import StoreAway, StoreTooSlow, connect, migrate, translated
from app.store.schema import metadata, usage_records
from app.tenants.budget import Budget, Owner, Period
from tests.support.records import NOON, completed

pytestmark = pytest.mark.unit


def test_migrations_make_the_tables_that_the_code_uses(engine):
    assert migrate(engine)
    assert not migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


VERSIONS = sorted((Path(migrations.__file__).parent / "versions").glob("r*.py"))


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.stem)
def test_a_step_of_the_past_does_not_change_with_the_code(path):
    """ce60350: the first took its column types from the schema of today."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(node.module)
    assert {name.partition(".")[0] for name in imported} <= {"__future__", "alembic", "sqlalchemy"}


def test_records_from_before_estimates_and_preemptions_were_counted(engine, monkeypatch):
    upgrade = command.upgrade
    monkeypatch.setattr(command, "upgrade", lambda config, _: upgrade(config, "0001"))
    migrate(engine)
    monkeypatch.undo()
    new = {"usage_estimated", "preemptions", "ingress", *USED[3:], *PRICES[4:]}
    record, columns = completed(), [c for c in usage_records.c if c.name not in new]
    values = {**record.to_fields(), "day": record.origin.arrived.date()}
    with engine.begin() as connection:
        for name in new:
            values.pop(name)
        # Not `usage_records.insert()`, which would know the new column.
        connection.execute(insert(Table("usage_records", MetaData(), *map(copy, columns))), values)
    assert migrate(engine)
    store = RecordStore(engine)
    assert list(store.each(Wanted())) == [record]
    spend = Budget(Owner.KEY, record.origin.key_id, Period.TOTAL, Decimal(1)).at(NOON.date())
    assert store.spent(spend) == {"": record.cost}
    with engine.begin() as connection:
        connection.execute(insert(usage_records), {**values, "request_id": "of an old ingress"})
    assert store.spent(spend) == {"": 2 * record.cost}
    found = list(store.each(Wanted()))
    assert {(one.usage_estimated, one.preemptions) for one in found} == {(False, None)}


def test_spend_from_before_there_were_more_prices_is_kept(engine, monkeypatch):
    upgrade = command.upgrade
    monkeypatch.setattr(command, "upgrade", lambda config, _: upgrade(config, "0007"))
    migrate(engine)
    monkeypatch.undo()
    new = {*USED[3:], *PRICES[4:]}
    former = [column for column in usage_records.c if column.name not in new]
    table = Table("usage_records", MetaData(), *map(copy, former))
    record = completed()
    values = {**record.to_fields(), "day": record.origin.arrived.date()}
    values = {name: value for name, value in values.items() if name not in new}

    def write_as_formerly(request_id):
        with engine.begin() as connection:
            connection.execute(insert(table), values | {"request_id": request_id})

    write_as_formerly("of then")
    store = RecordStore(engine)
    spend = Budget(Owner.KEY, record.origin.key_id, Period.TOTAL, Decimal(1)).at(NOON.date())
    assert store.spent(spend) == {"": record.cost}
    write_as_formerly("of an old ingress")
    card = RateCard(input=1, output=2, cache_write=3, image="0.5", audio_second="0.25")
    usage = TokenUsage(100, 20, 10, 30, 2, 7)
    dear = [completed(card=card, usage=usage), completed(card=card, usage=usage)]
    store.add([one.to_json() for one in dear])
    assert store.spent(spend) == {"": 2 * record.cost + 2 * dear[0].cost}
    assert {one.cost for one in store.each(Wanted())} == {record.cost, dear[0].cost}
    assert add_up(store.totals(Wanted(), [])).cost == 2 * record.cost + 2 * dear[0].cost
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM spend")).scalar() == 2


def copy(column):
    return Column(column.name, column.type)


MIGRATE = """
import sys
from sqlalchemy import make_url
from app.store.database import StoreAway, StoreTooSlow, connect, migrate, translated
sys.stdin.readline()
print(migrate(connect(make_url(sys.argv[1]))))
"""


def test_of_several_processes_that_start_at_once_one_migrates(engine, url):
    text_of_url = url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATE, text_of_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda process: process.communicate("\n", timeout=60)[0], processes))
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(line.strip() for line in said) == ["False", "False", "False", "True"]
    assert {"usage_records", "api_keys"} <= set(inspect(engine).get_table_names())


def test_one_process_brings_several_databases_up_to_date_at_once(tmp_path):
    """As an ingress whose ledger was changed while the one before still started."""
    engines = [connect(make_url(f"sqlite:///{tmp_path}/{number}.db")) for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(migrate, engines)) == [True] * 8
    for engine in engines:
        engine.dispose()


def test_tables_of_a_newer_version_are_left_alone(engine):
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreAway, match="newer version"):
        migrate(engine)


def test_a_failed_step_leaves_nothing_behind(engine, monkeypatch):
    monkeypatch.setattr("app.store.database.command.upgrade", _upgrade_then_fail)
    with pytest.raises(RuntimeError):
        migrate(engine)
    assert inspect(engine).get_table_names() == []
    monkeypatch.undo()
    assert migrate(engine)


def _upgrade_then_fail(config, revision):
    from alembic.command import upgrade

    upgrade(config, revision)
    raise RuntimeError


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////proc/no/such/place.db",
        "postgresql+psycopg://frontline:hunter2@127.0.0.1:1/frontline",
    ],
)
def test_a_database_that_is_away_is_told_without_its_password(url):
    with pytest.raises((StoreAway, OSError)) as caught:
        migrate(connect(make_url(url)))
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__suppress_context__ or isinstance(caught.value, OSError)


def test_a_statement_that_takes_too_long_is_stopped_and_the_connection_goes_on(url):
    engine = connect(url, connections=1, statement_timeout_s=0.3)
    long = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT count(*) FROM n",
        "postgresql": "SELECT pg_sleep(60)",
    }
    with pytest.raises(StoreTooSlow), translated(), engine.connect() as connection:
        connection.execute(text(long[engine.dialect.name]))
    with translated(), engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()
