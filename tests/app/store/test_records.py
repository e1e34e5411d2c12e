from datetime import date, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.ledger.record import State
from app.store.database import migrate
from app.store.records import RecordStore, Wanted
from app.store.schema import usage_records
from tests.app.ledger.records import NOON, completed, new_id, origin, records, shed

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
