import csv
import io
import json
from decimal import Decimal

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from app.cli.main import main
from app.ledger.record_store import RecordStore
from app.store.database import connect, migrate
from app.tenants.key_store import KeyStore
from tests.app.ledger.test_journal import writer
from tests.support.records import completed, opened, shed

pytestmark = pytest.mark.unit


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/ledger/usage.db"


@pytest.fixture
def engine(url):
    engine = connect(make_url(url))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def run(url):
    def run(*words, fails=False):
        result = CliRunner().invoke(main, [*words, "--ledger", url])
        assert (result.exit_code != 0) is fails, result.output
        return result.stderr if fails else result.stdout

    return run


def test_a_key_is_shown_once_and_works_until_it_is_revoked(run, engine):
    text = run("keys", "create", "--tenant", "acme", "--rpm", "60").strip()
    key = KeyStore(engine).table().find(text)
    assert key is not None
    assert (key.tenant, key.limits.rpm) == ("acme", 60)
    listed = run("keys", "list")
    assert key.key_id in listed and text not in listed and key.secret_hash not in listed
    run("keys", "revoke", key.key_id)
    assert KeyStore(engine).table().find(text) is None
    assert "no key" in run("keys", "revoke", key.key_id, fails=True)


def test_a_key_with_everything(run, engine):
    said = run(
        "keys", "create", "--tenant", "acme", "--name", "ci", "--default-tier", "flex",
        "--tiers", "flex", "--tpm", "9", "--priority-share", "0.25", "--json",
    )  # fmt: skip
    fields = json.loads(said)
    (key,) = KeyStore(engine).all()
    assert KeyStore(engine).table().find(fields["key"]) == key
    assert fields["tiers"] == "default,flex"
    assert key.limits.priority_share == Decimal("0.25")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tiers", "fast"], "--tiers: expected some of priority, default, flex"),
        (["--tiers", "default", "--default-tier", "flex"], "among its tiers"),
        (["--priority-share", "2"], "from 0 to 1"),
        (["--priority-share", "x"], "from 0 to 1"),
        (["--name", "a\nb"], "printable"),
    ],
)
def test_a_wrong_key_is_not_made(run, engine, words, message):
    assert message in run("keys", "create", "--tenant", "acme", *words, fails=True)
    assert KeyStore(engine).all() == []


def test_usage_in_every_form(run, engine):
    written = [completed(), completed(tenant="b", model="[red]n"), shed()]
    RecordStore(engine).add([record.to_json() for record in written])
    cost = written[0].cost
    (line,) = run("usage", "--tenant", "b", "--by", "model", "--format", "json").splitlines()
    assert json.loads(line) == {
        "model": "[red]n", "requests": 1, "prompt_tokens": 1000, "cached_tokens": 400,
        "completion_tokens": 250, "cost": "0.000039",
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(run("usage", "--by", "tier", "--format", "csv"))))
    assert [(row["tier"], Decimal(row["cost"])) for row in rows] == [
        ("", 0),
        ("priority", 2 * cost),
    ]
    table = run("usage")
    assert "[red]n" in table and "0.000078" in table
    lines = run("usage", "--format", "records-json").splitlines()
    states = sorted(json.loads(line)["state"] for line in lines)
    assert states == ["completed", "completed", "shed"]
    assert len(run("usage", "--format", "records-csv").splitlines()) == 4
    events = [json.loads(line) for line in run("usage", "--format", "cloudevents").splitlines()]
    assert {event["id"] for event in events} == {r.origin.request_id for r in written}
    assert events == [
        json.loads(line) for line in run("usage", "--format", "cloudevents").splitlines()
    ]
    assert "nothing" in run("usage", "--since", "2030-01-01")
    assert "expected some of" in run("usage", "--by", "colour", fails=True)


def test_a_dead_ingress_is_settled_by_hand(run, engine, tmp_path):
    with writer(tmp_path / "journal") as ours:
        ours.open(opened("stream"))
        ours.commit()
    assert "1 records" in run("ledger", "adopt", "--folder", str(tmp_path / "journal"))
    assert "interrupted" in run("usage", "--by", "state")
    assert "0 records" in run("ledger", "adopt", "--folder", str(tmp_path / "journal"))


def test_no_password_is_shown(tmp_path):
    url = "postgresql://frontline:hunter2@127.0.0.1:1/frontline"
    result = CliRunner().invoke(main, ["ledger", "migrate", "--ledger", url])
    assert result.exit_code == 1 and "hunter2" not in result.output + repr(result.exception)
    result = CliRunner().invoke(main, ["ledger", "migrate", "--ledger", "mysql://u:hunter2@h/d"])
    assert result.exit_code == 1 and "hunter2" not in result.output
