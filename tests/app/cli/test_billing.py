import csv
import io
import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from app.cli.main import main
from app.core.dialect import Route
from app.ledger.record_store import RecordStore
from app.store.database import connect, migrate
from app.tenants.key_store import KeyStore
from tests.app.ledger.test_journal import writer
from tests.support.records import NOON, completed, opened, shed

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
    key = KeyStore(engine).table().find(text, NOON)
    assert key is not None
    assert (key.tenant, key.limits.rpm) == ("acme", 60)
    listed = run("keys", "list")
    assert key.key_id in listed and text not in listed and key.secret_hash not in listed
    run("keys", "revoke", key.key_id)
    assert KeyStore(engine).table().find(text, NOON) is None
    assert "no key" in run("keys", "revoke", key.key_id, fails=True)


@pytest.mark.parametrize("options", [[], ["--admin"]])
def test_only_a_key_that_was_created_so_is_an_admin_key(run, engine, options):
    text = run("keys", "create", "--tenant", "ops", *options).strip()
    [key] = KeyStore(engine).table().by_id.values()
    assert key.admin is bool(options) and key.key_id in text
    assert json.loads(run("keys", "list", "--json"))["admin"] is bool(options)


def test_a_key_with_everything(run, engine):
    said = run(
        "keys", "create", "--tenant", "acme", "--name", "ci", "--default-tier", "flex",
        "--tiers", "flex", "--tpm", "9", "--priority-share", "0.25", "--in-flight", "3",
        "--models", "acme/*, m", "--routes", "chat/completions,embeddings",
        "--allow-address", "10.0.0.0/8", "--allow-address", "::1",
        "--expires", "2100-01-01", "--budget", "month=10", "--budget", "day=0.5:warn", "--json",
    )  # fmt: skip
    fields = json.loads(said)
    (key,) = KeyStore(engine).all()
    assert KeyStore(engine).table().find(fields["key"], NOON) == key
    assert fields["tiers"] == "default,flex"
    assert (key.limits.priority_share, key.limits.in_flight) == (Decimal("0.25"), 3)
    assert key.scope.models == {"acme/*", "m"}
    assert key.scope.routes == {Route.CHAT, Route.EMBEDDINGS}
    assert (fields["models"], fields["routes"]) == ("acme/*,m", "chat/completions,embeddings")
    assert fields["addresses"] == "10.0.0.0/8,::1/128"
    assert json.loads(run("keys", "list", "--json"))["addresses"] == "10.0.0.0/8,::1/128"
    assert key.expires == datetime(2100, 1, 1, tzinfo=UTC)
    assert fields["budgets"] == "day=0.5:warn,month=10"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tiers", "fast"], "--tiers: expected some of priority, default, flex"),
        (["--tiers", "default", "--default-tier", "flex"], "among its tiers"),
        (["--priority-share", "2"], "from 0 to 1"),
        (["--priority-share", "x"], "from 0 to 1"),
        (["--name", "a\nb"], "printable"),
        (["--budget", "10"], "expected day|month|total=USD"),
        (["--budget", "day=1", "--budget", "day=2"], "at most one for each period"),
        (["--models", ""], "no id"),
        (["--allow-address", "10.0.0.1/8"], "no address and no network"),
        (["--allow-address", ""], "no address and no network"),
        (["--routes", "chat"], "--routes: expected some of chat/completions,"),
    ],
)
def test_a_wrong_key_is_not_made(run, engine, words, message):
    assert message in run("keys", "create", "--tenant", "acme", *words, fails=True)
    assert KeyStore(engine).all() == []


def test_a_key_is_changed(run, engine):
    run("keys", "create", "--tenant", "acme", "--rpm", "60", "--budget", "day=1")
    [before] = KeyStore(engine).all()
    words = [
        "rpm=",
        "tpm=9",
        "addresses=10.0.0.0/8,::1",
        "priority_share=0.5",
        "tiers=flex",
        "name=",
    ]
    run("keys", "change", before.key_id, *words, "models=a, b*", "expires_at=4102444800")
    [key] = KeyStore(engine).all()
    assert (key.limits.rpm, key.limits.tpm, key.limits.priority_share) == (None, 9, Decimal("0.5"))
    assert set(map(str, key.scope.addresses)) == {"10.0.0.0/8", "::1/128"}
    assert (key.scope.models, key.expires) == ({"a", "b*"}, datetime(2100, 1, 1, tzinfo=UTC))
    assert key.tiers == {"default", "flex"} and key.budgets == before.budgets
    for bad, message in [
        ("rpm", "expected FIELD=VALUE"),
        ("rpm=many", "rpm: expected a whole number"),
        ("tenant=b", "tenant: cannot be changed"),
        ("colour=red", "no such field"),
    ]:
        assert message in run("keys", "change", key.key_id, bad, fails=True)
    assert KeyStore(engine).all() == [key]
    run("keys", "revoke", key.key_id)
    assert "no key" in run("keys", "change", key.key_id, "rpm=1", fails=True)


def test_usage_in_every_form(run, engine):
    written = [completed(), completed(tenant="b", model="[red]n"), shed()]
    RecordStore(engine).add([record.to_json() for record in written])
    cost = written[0].cost
    (line,) = run("usage", "--tenant", "b", "--by", "model", "--format", "json").splitlines()
    assert json.loads(line) == {
        "model": "[red]n", "requests": 1, "prompt_tokens": 1000, "cached_tokens": 400,
        "completion_tokens": 250, "cache_write_tokens": 0, "images": 0, "audio_seconds": 0,
        "cost": "0.000039",
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
