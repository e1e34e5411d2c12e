from datetime import date, timedelta
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.ingress import IngressSettings
from app.config.usage_reads import UsageSettings
from app.core.errors import InvalidRequest, UsageBusy
from app.gateway.asgi import build_api
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.gateway.usage_route import span
from app.ledger.record_store import TooManyRows
from app.store.database import StoreAway, StoreTooSlow

pytestmark = pytest.mark.unit

DAYS = st.dates(date(1, 1, 1), date(9999, 12, 31))
TODAY = st.dates(date(2020, 1, 1), date(2100, 1, 1))


@given(st.none() | DAYS, st.none() | DAYS, TODAY, st.integers(1, 1000))
def test_no_more_days_are_read_than_may_be(start, end, today, most):
    try:
        since, until = span(start, end, today, most)
    except InvalidRequest as error:
        assert start is not None and error.param == "start"
        assert ((end or today + timedelta(days=1)) - start).days > most
        return
    assert start in (None, since) and end in (None, until)
    # What is to come has no records.
    assert (min(until, today + timedelta(days=1)) - since).days <= most


def test_by_default_it_is_the_last_days_until_today():
    today = date(2026, 11, 29)
    assert span(None, None, today, 7) == (date(2026, 11, 23), date(2026, 11, 30))
    assert span(date(2026, 11, 28), None, today, 7) == (date(2026, 11, 28), date(2026, 11, 30))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UsageBusy(), 429, "rate_limit_exceeded"),
        (TooManyRows(), 400, "usage_too_large"),
        (StoreTooSlow("SELECT secret"), 400, "usage_too_large"),
        (StoreAway("db.internal is away"), 503, "ledger_unavailable"),
        (None, 200, None),
    ],
)
async def test_what_cannot_be_read_is_told_in_openais_shape(error, status, code):
    async def totals(wanted, groups):
        if error is not None:
            raise error
        return []

    services = Services(ModelRegistry(None, discover_s=1), None, IngressSettings())
    services.ready.set()
    services.usage = SimpleNamespace(settings=UsageSettings(), totals=totals)
    transport = httpx.ASGITransport(build_api(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/v1/usage", params={"end": "2026-11-30"})
        assert answer.status_code == status
        assert "secret" not in answer.text and "internal" not in answer.text
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        if code is None:
            assert (answer.json()["start"], answer.json()["end"]) == ("2025-11-29", "2026-11-30")
            return
        assert answer.json()["error"]["code"] == code
        for name, value in (("tier", "fast"), ("model", ""), ("key", "a\0"), ("of", "me")):
            wrong = await client.get("/v1/usage", params={name: value})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, name)
        long = await client.get("/v1/usage", params={"start": "2020-01-01"})
        assert (long.status_code, long.json()["error"]["param"]) == (400, "start")
