import csv
import io
import json
from decimal import Decimal
from fractions import Fraction

import pytest
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from app.ledger.usage import (
    Total,
    add_up,
    cloud_event,
    plain,
    record_fields,
    usage_object,
    write_csv,
    write_json_lines,
)
from tests.support.records import completed, records

pytestmark = pytest.mark.unit


def test_what_the_route_answers():
    totals = [
        Total({"model": "m"}, 2, 10, 5, 7, 1, 2, 3, Decimal("0.10")),
        Total({"model": "n"}, 1, 1, 0, 1, 0, 0, 4, Decimal("0.0000000000000000000000000000001")),
    ]
    answer = usage_object(totals)
    assert [entry["cost"] for entry in answer["data"]] == [
        "0.1",
        "0.0000000000000000000000000000001",
    ]
    assert answer["total"]["cost"] == "0.1000000000000000000000000000001"
    assert answer["total"]["requests"] == 3
    assert usage_object([])["total"]["cost"] == "0"


@given(st.lists(st.decimals(0, 10**9, places=30)))
def test_totals_add_up(costs):
    whole = add_up(Total({}, 1, 0, 0, 0, 0, 0, 0, cost) for cost in costs)
    assert Fraction(whole.cost) == sum(map(Fraction, costs))


@given(st.decimals(0, 10**9, places=24))
def test_amounts_keep_their_value(amount):
    assert Decimal(plain(amount)) == amount
    assert "E" not in plain(amount)


@given(records())
def test_an_event_is_what_the_official_library_reads(record):
    event = cloud_event(record, "frontline")
    read = parse(json.dumps(event))
    assert (read.get_id(), read.get_source()) == (record.origin.request_id, "frontline")
    assert read.get_subject() == record.origin.tenant
    assert read.get_time() == record.ended
    assert Decimal(read.get_data()["cost"]) == record.cost
    assert cloud_event(record, "frontline") == event


def parse(text):
    return JSONFormat().read(None, text)


def test_an_event_without_a_tenant_has_no_subject():
    record = completed(tenant="")
    assert parse(json.dumps(cloud_event(record, "frontline"))).get_subject() is None


def test_exports_read_back():
    rows = [record_fields(completed()) for _ in range(3)]
    lines, table = io.StringIO(), io.StringIO()
    write_json_lines(rows, lines)
    assert [json.loads(line) for line in lines.getvalue().splitlines()] == rows
    write_csv(rows, table)
    read = list(csv.DictReader(io.StringIO(table.getvalue())))
    assert [row["cost"] for row in read] == [row["cost"] for row in rows]
    write_csv([], table)


def test_a_spreadsheet_gets_no_formula():
    out = io.StringIO()
    write_csv([{"tenant": "=cmd()", "cost": "0.1", "reason": None, "empty": ""}], out)
    assert out.getvalue() == "tenant,cost,reason,empty\n'=cmd(),0.1,,\n"
