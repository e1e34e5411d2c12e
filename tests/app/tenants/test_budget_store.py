from decimal import Decimal

import pytest
from sqlalchemy import make_url, text

from app.store.database import connect, migrate
from app.tenants.budget import Budget, Owner, Period
from app.tenants.budget_store import BudgetStore
from app.tenants.key_store import KeyStore
from app.tenants.keys import create_key
from tests.support.records import NOON

pytestmark = pytest.mark.unit

AMOUNT = Decimal("0.000000000001")


def test_budgets_come_back_as_they_were(engine):
    migrate(engine)
    store = BudgetStore(engine)
    day, month = (
        Budget(Owner.TENANT, "é", period, AMOUNT, hard)
        for period, hard in ((Period.DAY, False), (Period.MONTH, True))
    )
    store.set(month, day)
    store.set(day)
    assert store.table().by_owner == {("tenant", "é"): (day, month)}
    assert store.remove(Owner.TENANT, "é", Period.DAY) == 1
    assert store.remove(Owner.TENANT, "é") == 1
    assert store.remove(Owner.TENANT, "é") == 0
    assert store.table().by_owner == {}


@pytest.mark.parametrize("owner", Owner)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("period", "week"), ("period", b"day"), ("usd", "many"), ("usd", "-1"), ("usd", "NaN"),
        ("usd", "1e13"), ("usd", ""), ("usd", b"1"), ("hard", 2), ("hard", "yes"),
    ],
)  # fmt: skip
def test_a_key_with_a_budget_that_cannot_be_read_does_not_work(tmp_path, owner, column, value):
    """It could spend without a bound otherwise."""
    engine = connect(make_url(f"sqlite:///{tmp_path}/usage.db"))
    migrate(engine)
    keys = KeyStore(engine)
    bad, sent = create_key("acme", created=NOON)
    good, good_sent = create_key("b", budgets=["day=1"], created=NOON)
    keys.add(bad)
    keys.add(good)
    name = bad.key_id if owner is Owner.KEY else "acme"
    BudgetStore(engine).set(Budget(owner, name, Period.DAY, Decimal(1)))
    with engine.begin() as connection:
        connection.execute(
            text(f"UPDATE budgets SET {column} = :value WHERE name = :name"),
            {"value": value, "name": name},
        )
    table = keys.table()
    assert table.find(sent, NOON) is None and table.find(good_sent, NOON) == good
    assert bad.key_id in table.unreadable
    assert any(name in each for each in table.unreadable)
    engine.dispose()
