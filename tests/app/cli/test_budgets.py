import json

import pytest

from app.ledger.record import now_utc
from app.ledger.record_store import RecordStore
from app.tenants.key_store import KeyStore
from tests.app.cli.test_billing import engine, run, url
from tests.support.records import completed

pytestmark = pytest.mark.unit

__all__ = ["engine", "run", "url"]


@pytest.fixture
def key(run, engine):
    run("keys", "create", "--tenant", "acme")
    (made,) = KeyStore(engine).all()
    return made.key_id


def test_budgets_are_set_changed_shown_and_removed(run, engine, key):
    record = completed(tenant="acme", key_id=key, arrived=now_utc())
    RecordStore(engine).add([record.to_json()])
    run("budgets", "set", "--key", key, "day=5", "month=100:warn")
    run("budgets", "set", "--key", key, "day=7.50")
    run("budgets", "set", "--tenant", "acme", "total=1000")
    (found,) = KeyStore(engine).all()
    assert [str(each) for each in found.budgets] == ["day=7.50", "month=100:warn", "total=1000"]
    rows = [json.loads(line) for line in run("budgets", "list", "--json").splitlines()]
    assert [(row["owner"], row["period"], row["usd"], row["mode"]) for row in rows] == [
        ("key", "day", "7.5", "hard"),
        ("key", "month", "100", "warn"),
        ("tenant", "total", "1000", "hard"),
    ]
    assert {row["spent"] for row in rows} == {"0.000039"}
    assert "7.5" in run("budgets", "list")
    assert json.loads(run("keys", "list", "--json"))["budgets"] == "day=7.50,month=100:warn"
    run("budgets", "remove", "--key", key, "--period", "month")
    assert "no such budget" in run(
        "budgets", "remove", "--key", key, "--period", "month", fails=True
    )
    assert "2 removed" not in run("budgets", "remove", "--tenant", "acme")
    (found,) = KeyStore(engine).all()
    assert [str(each) for each in found.budgets] == ["day=7.50"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--key", "none", "day=1"], "no key 'none' works"),
        (["day=1"], "expected --key or --tenant"),
        (["--key", "a", "--tenant", "b", "day=1"], "expected --key or --tenant"),
        (["--tenant", "acme", "week=1"], "expected day|month|total=USD"),
    ],
)
def test_a_wrong_budget_is_not_set(run, words, message):
    assert message in run("budgets", "set", *words, fails=True)
    assert "nothing" in run("budgets", "list")
