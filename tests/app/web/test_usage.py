import csv
import io
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from app.config.ingress import IngressSettings
from app.config.usage_reads import UsageSettings
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.gateway.usage_reader import UsageReader
from app.ledger.record import now_utc
from app.ledger.record_store import RecordStore
from app.ledger.usage import Total, add_up, plain
from app.store.database import connect
from app.tenants.access import Access
from app.tenants.budget import Owner, parse_budgets
from app.tenants.budget_gate import BudgetGate
from app.tenants.keys import KeyLimits, KeyTable, create_key
from app.tenants.limiter import LimitBooks
from app.tenants.spending import SpendBook
from app.web.usage_view import bars, money, place_of, read_place
from tests.support.records import completed, origin

pytestmark = pytest.mark.unit

NOW = now_utc().replace(microsecond=0)


class Keys:
    def __init__(self, *keys):
        self.keys = keys

    def table(self):
        return KeyTable.of(self.keys)


class Books:
    def __init__(self):
        self.books = LimitBooks()

    async def answer(self, asks):
        return self.books.answer(asks, 0.0)

    async def spend(self, report):
        return SpendBook().answer(report, 0.0)


@pytest.fixture
def store(tmp_path):
    engine = connect(make_url(f"sqlite:///{tmp_path}/usage.db"))
    store = RecordStore(engine)
    store.prepare()
    yield store
    engine.dispose()


@pytest.fixture
async def signed_in(services, store, tmp_path, browser):
    """A browser with the key of a tenant whose limits are known."""
    key, text = create_key(
        "acme",
        limits=KeyLimits(rpm=60, priority_share=Decimal("0.25")),
        budgets=["month=12.5"],
        created=datetime.now(UTC),
    )
    services.settings = IngressSettings.load({"auth": "keys"}, "user_config")
    tenants = parse_budgets(["total=100:warn"], Owner.TENANT, "acme")
    key = replace(key, budgets=(*key.budgets, *tenants))
    services.access = Access("ingress", Keys(key), Books())
    services.access.start()
    services.budgets = BudgetGate("ingress", Books(), store.spent, patience_s=0.1)
    bounds = UsageSettings(max_rows=60, max_reads_per_tenant=2)
    services.usage = UsageReader(make_url(f"sqlite:///{tmp_path}/usage.db"), bounds)
    headers = {"sec-fetch-site": "same-origin"}
    answer = await browser.post("/login", data={"key": text}, headers=headers)
    assert answer.headers["location"] == "/usage"
    yield browser
    await services.access.stop()
    await services.budgets.stop()
    services.usage.close()


def add(store, *records):
    store.add([record.to_json() for record in records])


def rows(answer):
    return list(csv.DictReader(io.StringIO(answer.text)))


async def test_a_tenant_sees_what_was_requested_and_served_side_by_side(signed_in, store):
    lowered = completed(requested=Tier.PRIORITY, served=Tier.DEFAULT, arrived=NOW)
    other = completed(tenant="rival", model="rivals-own", arrived=NOW)
    add(store, lowered, other)
    page = unescape((await signed_in.get("/usage")).text)
    assert "Usage of acme" in page and "rival" not in page
    assert 'tag priority">priority' in page and 'tag default">default' in page
    assert "no replica honours priority" in page
    assert plain(lowered.cost) in page


async def test_limits_are_shown_with_what_is_left(signed_in, store):
    page = (await signed_in.get("/usage")).text
    assert "requests a minute" in page and ">60</td>" in page
    assert "requests served as priority" in page and "25 %" in page
    assert "tokens a minute" not in page


async def test_budgets_are_shown_with_what_is_left(signed_in, store, services):
    """Those of the tenant too. What is not known is not shown as nothing."""
    spent = completed(tenant="acme", key_id="another", arrived=NOW, usage=TokenUsage(10**6, 0, 0))
    add(store, spent)
    page = unescape((await signed_in.get("/usage")).text)
    assert "this key, a month" in page and "not known" in page
    services.budgets.start()
    page = unescape((await signed_in.get("/usage")).text)
    assert "this key, a month" in page and ">12.50</td>" in page and "not known" not in page
    assert "the tenant, in total" in page and f">{plain(100 - spent.cost)}</td>" in page
    assert "requests are refused" in page and "there is an alert" in page


async def test_the_csv_files_have_every_digit_and_add_up(signed_in, store):
    made = [completed(usage=TokenUsage(7, 1, n), arrived=NOW) for n in range(1, 9)]
    add(store, *made, completed(tenant="rival", arrived=NOW))
    records, totals = [await signed_in.get(f"/usage/{n}.csv") for n in ("records", "totals")]
    assert records.headers["content-type"].startswith("text/csv")
    assert 'filename="usage-records-' in records.headers["content-disposition"]
    cost = sum((one.cost for one in made), Decimal(0))
    assert sum(Decimal(row["cost"]) for row in rows(records)) == cost
    assert sum(Decimal(row["cost"]) for row in rows(totals)) == cost
    assert {row["request_id"] for row in rows(records)} == {m.origin.request_id for m in made}
    assert "replica" not in rows(records)[0] and "engine" not in rows(records)[0]


@pytest.mark.parametrize("model", ["=1+1", '=cmd|"/c calc"!A1', "+1", "-1", "@x", "a,b\"c'\nd"])
async def test_a_csv_does_no_harm_in_a_spreadsheet(signed_in, store, model):
    add(store, completed(model=model, arrived=NOW))
    for name in ("records", "totals"):
        [row] = rows(await signed_in.get(f"/usage/{name}.csv"))
        assert row["model"] in (model, f"'{model}")
        assert row["model"][0] not in "=+-@"


async def test_names_are_shown_as_text(signed_in, store):
    add(store, completed(model="<script>alert(1)</script>", arrived=NOW))
    page = (await signed_in.get("/usage")).text
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "style=" not in page


async def test_older_requests_are_on_further_pages_each_once(signed_in, store):
    made = [completed(arrived=NOW - timedelta(seconds=n // 3)) for n in range(120)]
    add(store, *made)
    seen, url = [], "/usage"
    while url:
        page = (await signed_in.get(url)).text
        seen += [one.origin.request_id for one in made if one.origin.request_id in page]
        _, _, link = page.partition('class="actions"><a class="button" href="')
        url = unescape(link.partition('"')[0])
    assert len(seen) == len(set(seen)) == len(made)


async def test_reads_are_bounded(signed_in, store):
    add(store, *(completed(arrived=NOW) for _ in range(61)))
    answer = await signed_in.get("/usage/records.csv")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "usage_too_large")
    long = await signed_in.get("/usage?start=2000-01-01&end=2026-01-01")
    assert long.status_code == 400 and "at most" in long.text


@pytest.mark.parametrize(
    "query", ["start=x", "end=2026-13-01", "before=x", "before=2026-01-01", "before=2026-01-01+x"]
)
async def test_a_bad_parameter_is_named(signed_in, query):
    answer = await signed_in.get(f"/usage?{query}")
    assert answer.status_code == 400 and query.partition("=")[0] in answer.text


@pytest.mark.parametrize("query", ["end=9999-12-31", "start=0001-01-01&end=0001-01-01", "start="])
async def test_the_ends_of_time_are_no_fault(signed_in, query):
    """At 410afd7 the first kept the event loop for half a minute, with a bar for each day."""
    answer = await signed_in.get(f"/usage?{query}")
    assert answer.status_code == 200
    assert answer.text.count("<title>") <= 400


async def test_nobody_else_sees_it(signed_in):
    signed_in.cookies.clear()
    answer = await signed_in.get("/usage")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/usage")
    assert (await signed_in.get("/usage/records.csv")).status_code == 401
    headers = {"sec-fetch-site": "cross-site"}
    assert (await signed_in.get("/usage/totals.csv", headers=headers)).status_code == 403


DAY = date(2026, 11, 1)
TOTALS = st.lists(
    st.builds(
        lambda day, tier, cost: Total(
            {"day": (DAY + timedelta(days=day)).isoformat(), "tier": tier},
            1,
            1,
            0,
            1,
            0,
            0,
            0,
            cost,
        ),
        st.integers(0, 9),
        st.sampled_from([*(tier.value for tier in Tier), None]),
        st.decimals(0, 1000, places=6),
    )
)


@given(TOTALS)
def test_bars_are_as_high_as_the_days_cost(totals):
    days = bars(totals, DAY, DAY + timedelta(days=10))
    assert len(days) == 10
    costs = [
        add_up(t for t in totals if t.group["day"] == one.day and t.group["tier"]).cost
        for one in days
    ]
    for one, cost in zip(days, costs, strict=True):
        height = sum(part.height for part in one.parts)
        assert height == pytest.approx(float(100 * cost / max(costs)) if max(costs) else 0, abs=0.1)
        assert all(part.top >= -0.01 for part in one.parts)


@given(st.decimals(0, 10**9, places=9))
def test_money_has_every_digit(amount):
    assert Decimal(money(amount).replace(",", "")) == amount


def test_a_place_is_read_as_it_was_written():
    record = completed(arrived=NOW)
    assert read_place(place_of(record)) == (NOW, record.origin.request_id)
    assert origin().request_id


@given(st.text())
def test_any_text_may_be_asked_for_as_a_place(text):
    try:
        moment, request_id = read_place(text)
    except ValueError:
        return
    assert moment.tzinfo is not None and request_id
