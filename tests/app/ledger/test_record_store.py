from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, make_url, text

from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.ledger import record_store
from app.ledger.record import State
from app.ledger.record_store import RecordStore, Wanted
from app.ledger.usage import Grouping, add_up
from app.store.database import StoreRefuses, connect, migrate
from app.store.schema import spend as spend_table
from app.store.schema import usage_records
from app.tenants.budget import Budget, Owner, Period
from tests.support.records import NOON, completed, new_id, opened, origin, records, shed, total

pytestmark = pytest.mark.unit


@pytest.fixture
def store(engine):
    migrate(engine)
    return RecordStore(engine)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(records(), min_size=1, max_size=5))
def test_records_come_back_as_they_were_however_often_they_are_written(store, engine, written):
    with engine.begin() as connection:
        connection.execute(usage_records.delete())
    bodies = [record.to_json() for record in written]
    store.add(bodies)
    store.add(bodies[::-1] + bodies)
    order = sorted(written, key=lambda record: (record.origin.arrived, record.origin.request_id))
    assert list(store.each(Wanted())) == order


def test_the_first_record_of_a_request_stays(store):
    one = completed()
    other = completed(one.origin.request_id, tenant="another")
    store.add([one.to_json()])
    store.add([other.to_json(), shed().to_json()])
    assert [r for r in store.each(Wanted()) if r.state is State.COMPLETED] == [one]


def test_what_the_database_would_never_take_is_told_from_one_that_is_away(store):
    good, bad = completed(), completed()
    with pytest.raises(StoreRefuses):
        store.add([good.to_json(), bad.to_json().replace(b'"tenant":"acme"', b'"tenant":null')])
    assert list(store.each(Wanted())) == []
    store.add([good.to_json()])
    assert list(store.each(Wanted())) == [good]


@pytest.mark.parametrize(
    "field", [b',"usage_estimated":false', b',"preemptions":null', b',"ingress":""']
)
def test_a_record_of_an_older_ingress_lacks_a_field(store, field):
    record = completed()
    old = record.to_json().replace(field, b"")
    assert old != record.to_json()
    store.add([old])
    assert list(store.each(Wanted())) == [record]


SPENDS = [
    Budget(owner, name, period, Decimal(1)).at(NOON.date())
    for owner, name in ((Owner.KEY, "k1"), (Owner.TENANT, "acme"))
    for period in Period
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(
        st.builds(
            completed,
            tenant=st.sampled_from(["acme", "b"]),
            key_id=st.sampled_from(["k1", "k2"]),
            ingress=st.sampled_from(["", "i1", "i2"]),
            arrived=st.sampled_from([-40, -10, -1, 0, 1, 10]).map(
                lambda days: NOON + timedelta(days=days)
            ),
            served=st.sampled_from(Tier),
        ),
        max_size=12,
    )
)
def test_what_is_spent_is_added_up_by_ingress_to_the_last_digit(store, engine, written):
    with engine.begin() as connection:
        connection.execute(usage_records.delete())
        connection.execute(spend_table.delete())
    bodies = [record.to_json() for record in [*written, shed()]]
    store.add(bodies)
    # Written again, they change nothing.
    store.add(bodies)
    for spend in SPENDS:
        parts = {}
        for record in written:
            day = record.origin.arrived.date()
            owner = record.origin.key_id if spend.owner is Owner.KEY else record.origin.tenant
            within = spend.start is None or spend.start <= day < spend.end
            if owner == spend.name and within:
                parts.setdefault(record.origin.ingress, []).append(record)
        assert {name: Fraction(part) for name, part in store.spent(spend).items()} == {
            name: total(part) for name, part in parts.items()
        }


def test_what_a_key_or_tenant_has_spent_is_found_by_an_index(tmp_path):
    engine = connect(make_url(f"sqlite:///{tmp_path}/usage.db"))
    migrate(engine)
    statements = []
    event.listen(
        engine, "before_cursor_execute", lambda *args: statements.append((args[2], args[3]))
    )
    for spend in SPENDS:
        RecordStore(engine).spent(spend)
    with engine.connect() as connection:
        for statement, values in [each for each in statements if "FROM spend" in each[0]]:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
            assert any(row[3].startswith("SEARCH spend USING INDEX") for row in plan), plan
    engine.dispose()


def test_totals_are_split_by_whether_they_are_estimated(store):
    usage = TokenUsage(1, 0, 1)
    guess = opened().settle(State.INTERRUPTED, usage, ended=NOON, estimated=True)
    store.add([completed().to_json(), guess.to_json()])
    totals = store.totals(Wanted(), [Grouping.ESTIMATED])
    assert [(each.group["estimated"], each.cost) for each in totals] == [
        ("false", completed().cost),
        ("true", guess.cost),
    ]


def test_records_are_found_by_tenant_model_and_day(store):
    days = [NOON + timedelta(days=place) for place in range(3)]
    written = [
        completed(tenant=tenant, model=model, arrived=day)
        for tenant in ("a", "b") for model in ("m", "n") for day in days
    ]  # fmt: skip
    store.add([record.to_json() for record in written])
    wanted = Wanted("a", date(2026, 11, 23), date(2026, 11, 24), "n")
    (found,) = store.each(wanted)
    assert (found.origin.tenant, found.origin.model) == ("a", "n")
    assert found.origin.arrived == days[1]
    assert len(list(store.each(Wanted("a")))) == 6
    assert len(list(store.each(Wanted(since=date(2026, 11, 24))))) == 4


def test_a_quote_in_a_name_is_only_a_quote(store):
    odd = completed(tenant="""'; DROP TABLE usage_records; -- " \\ :batch %s é 漢""")
    store.add([odd.to_json()])
    assert list(store.each(Wanted(odd.origin.tenant))) == [odd]
    assert origin(new_id())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(records(), max_size=12), st.lists(st.sampled_from(Grouping), unique=True, max_size=4)
)
def test_totals_add_up_to_the_records_to_the_last_digit(store, engine, written, groupings):
    with engine.begin() as connection:
        connection.execute(usage_records.delete())
    # Some with equal prices, so that the database has something to add.
    written = [*written, *(completed(usage=record.usage) for record in written)]
    if written:
        store.add([record.to_json() for record in written])
    totals = store.totals(Wanted(), groupings)
    whole = add_up(totals)
    assert Fraction(whole.cost) == total(written)
    assert whole.requests == len(written)
    assert whole.completion_tokens == sum(record.usage.completion_tokens for record in written)
    assert len({tuple(each.group.items()) for each in totals}) == len(totals)


def test_totals_are_split_by_what_is_asked_for(store):
    day = timedelta(days=1)
    written = [
        completed(tenant="a", arrived=NOON),
        completed(tenant="a", arrived=NOON + day),
        completed(tenant="a", served=Tier.FLEX, arrived=NOON + day),
        completed(tenant="b", arrived=NOON),
        shed(),
    ]
    store.add([record.to_json() for record in written])
    totals = store.totals(Wanted("a"), [Grouping.DAY, Grouping.TIER])
    assert [(each.group["day"], each.group["tier"], each.requests) for each in totals] == [
        ("2026-11-22", "priority", 1),
        ("2026-11-23", "flex", 1),
        ("2026-11-23", "priority", 1),
    ]
    assert [each.cost for each in totals] == [written[0].cost, written[2].cost, written[1].cost]
    one = written[1].origin
    assert [r.origin for r in store.each(Wanted(requests=(one.request_id, "no")))] == [one]
    assert store.totals(Wanted("b", requests=(one.request_id,)), []) == []
    assert len(list(store.each(Wanted("a", tier=Tier.FLEX)))) == 1
    assert len(list(store.each(Wanted("a", key=one.key_id)))) == 3
    assert list(store.each(Wanted(key="nobody's"))) == []
    hours = store.totals(Wanted("a"), [Grouping.HOUR])
    assert [each.group["hour"] for each in hours] == ["2026-11-22T12", "2026-11-23T12"]
    turned_away = store.totals(Wanted("acme"), [Grouping.TIER])
    assert [(each.group["tier"], each.cost) for each in turned_away] == [(None, 0)]
    assert store.totals(Wanted("nobody"), [Grouping.DAY]) == []


def test_the_latest_records_come_in_pages_each_once(store):
    made = [completed(arrived=NOON + timedelta(milliseconds=250 * (n // 2))) for n in range(9)]
    store.add([record.to_json() for record in made])
    store.add([completed(tenant="another").to_json()])
    pages, before = [], None
    while page := store.latest(Wanted(tenant="acme"), 4, before):
        pages.append(page)
        before = (page[-1].origin.arrived, page[-1].origin.request_id)
    assert [len(page) for page in pages] == [4, 4, 1]
    order = sorted(made, key=lambda one: (one.origin.arrived, one.origin.request_id), reverse=True)
    assert [record for page in pages for record in page] == order


def test_sqlite_renders_a_records_json_once_and_not_for_each_column(store, engine):
    if engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL takes a record apart in one step")
    statement = record_store.insert_statement("sqlite")
    with engine.connect() as connection:
        plan = connection.execute(text(f"EXPLAIN QUERY PLAN {statement}"), {"batch": "[]"}).all()
    assert any("MATERIALIZE" in row[-1] for row in plan), plan
