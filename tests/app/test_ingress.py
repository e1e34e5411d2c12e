import asyncio
import json
import time
from decimal import Decimal

import pytest
from sqlalchemy import event, make_url

from app.config.ingress import FlightBounds
from app.core import errors
from app.core.pricing import RateCard, TokenUsage
from app.core.settings import SettingsError
from app.core.tiers import Tier
from app.gateway.serve_source import ServeHttp
from app.ingress import Ingress
from app.ledger.record import now_utc
from app.ledger.record_store import RecordStore, Wanted
from app.observe.observers import Ended, Refused
from app.store.database import StoreAway, connect
from app.tenants.access import Caller
from app.tenants.budget_webhook import Outcome
from app.tenants.keys import KeyLimits, create_key
from app.tenants.limiter import LimitBooks
from app.tenants.spending import SpendBook
from tests.app.tenants.test_budget_webhook import SECRET as WEBHOOK_SECRET
from tests.app.tenants.test_budget_webhook import Receiver
from tests.support.records import NOON, completed
from tests.support.waiting import until

pytestmark = pytest.mark.unit


class NoModels:
    """No Serve application, and no Ray to ask."""

    async def applications(self):
        return set()


@pytest.fixture
def stores(monkeypatch, tmp_path):
    """Every engine that the ingress makes, and which of them it has closed."""
    made, closed = [], []

    def noted(url):
        engine = connect(url)
        made.append(engine)
        event.listen(engine, "engine_disposed", closed.append)
        return engine

    async def loopback():
        return ServeHttp("127.0.0.1", None)

    # It would be of the whole test run.
    monkeypatch.setattr("app.ingress.settle_in", lambda: None)
    monkeypatch.setattr("app.ingress.connect", noted)
    monkeypatch.setattr("app.ingress.serve_http", loopback)
    monkeypatch.setattr("app.ingress.ServeSource", NoModels)
    monkeypatch.setattr("app.ingress.replica_log", lambda kind: tmp_path / f"{kind}.log")
    return made, closed


class Books:
    """The limits' books, which answer once they may."""

    def __init__(self):
        self.books, self.may, self.asked = LimitBooks(), asyncio.Event(), asyncio.Event()
        self.spends = SpendBook()

    async def answer(self, asks):
        self.asked.set()
        await self.may.wait()
        return self.books.answer(asks, time.monotonic())

    async def spend(self, report):
        return self.spends.answer(report, time.monotonic())


class Quiet(Ingress):
    """Serve awaits the end; Python, which cannot, would call it once more."""

    books: Books

    def __del__(self):
        pass


@pytest.fixture
async def ingress(stores, monkeypatch):
    books = Books()
    monkeypatch.setattr("app.ingress.ServeLimits", lambda _: books)
    made = Quiet(None)
    made.books = books
    yield made
    await Ingress.__del__(made)


def with_ledger(folder, name, auth="keys"):
    journal = {"folder": str(folder / "journal"), "segment_mb": 1}
    return {"auth": auth, "ledger": f"sqlite:///{folder}/{name}.db", "journal": journal}


async def test_a_request_that_waits_for_its_limit_goes_on_through_another_ledger(ingress, tmp_path):
    """59dfe9e: it waited for ever, for the asking had been ended."""
    key, _ = create_key("acme", created=NOON, limits=KeyLimits(rpm=1))
    caller = Caller("acme", key.key_id, None, key)
    await ingress.reconfigure(with_ledger(tmp_path, "one"))
    accounts = ingress.services.access
    charging = asyncio.create_task(accounts.charge(caller, 10))
    await asyncio.wait_for(ingress.books.asked.wait(), 5)
    await ingress.reconfigure(with_ledger(tmp_path, "two"))
    await asyncio.sleep(0.05)
    ingress.books.may.set()
    await asyncio.wait_for(charging, 5)
    with pytest.raises(errors.RateLimited):
        await ingress.services.access.charge(caller, 10)


@pytest.mark.parametrize("between", [None, "open"])
async def test_what_is_in_flight_stays_counted_through_another_ledger(ingress, tmp_path, between):
    """59dfe9e: a key got its whole bound once more."""
    key, _ = create_key("acme", created=NOON)
    caller = Caller("acme", key.key_id, None, key)
    await ingress.reconfigure(with_ledger(tmp_path, "one"))
    with ingress.services.access.flight(caller, FlightBounds(1, 1)):
        if between is not None:
            await ingress.reconfigure(with_ledger(tmp_path, "one", between))
            assert ingress.services.access is None
        await ingress.reconfigure(with_ledger(tmp_path, "two"))
        with pytest.raises(errors.TooManyInFlight):
            ingress.services.access.flight(caller, FlightBounds(1, 1))


async def test_budgets_are_kept_through_another_ledger_and_read_from_it(ingress, tmp_path):
    key, _ = create_key("acme", created=NOON, budgets=["total=1", "day=2"])
    await ingress.reconfigure(with_ledger(tmp_path, "one", "open"))
    services = ingress.services
    assert not services.budgets
    await ingress.reconfigure(with_ledger(tmp_path, "one"))
    budgets = services.budgets
    await budgets.require(key)
    half = Decimal("0.5")
    cost = RateCard.load({"input": half, "output": 0}, "x")
    now = now_utc()
    record = completed(
        key_id=key.key_id, card=cost, served=Tier.DEFAULT, usage=TokenUsage(10**6, 0, 0),
        arrived=now, ingress=ingress.services.registry.ingress,
    )  # fmt: skip
    ingress.services.observers.ended(Ended(record, 200))
    await ingress.reconfigure(with_ledger(tmp_path, "two"))
    assert ingress.services.budgets is budgets
    assert [state.spent for state in await budgets.states(key)] == [half, half]
    other, _ = create_key("acme", created=NOON, budgets=["total=1"])
    dead = completed(
        key_id=other.key_id, card=cost, served=Tier.DEFAULT, usage=TokenUsage(2 * 10**6, 0, 0),
        arrived=now, ingress="dead",
    )  # fmt: skip
    await ingress.services.ledger.settle(dead)
    store = RecordStore(connect(make_url(f"sqlite:///{tmp_path}/two.db")))
    store.prepare()
    while not list(store.each(Wanted(key=other.key_id))):
        await asyncio.sleep(0.02)
    with pytest.raises(errors.InsufficientQuota):
        await budgets.require(other)


async def test_alerts_go_to_the_webhook_of_the_settings(ingress, tmp_path, monkeypatch):
    monkeypatch.setenv("WEBHOOK_SECRET", WEBHOOK_SECRET)
    config = with_ledger(tmp_path, "one")
    key, _ = create_key("acme", created=NOON, budgets=["total=1"])
    cost = RateCard.load({"input": 1, "output": 0}, "x")
    async with Receiver(500).up() as receiver:
        webhook = {"url": receiver.url, "secret_env": "WEBHOOK_SECRET"}
        await ingress.reconfigure(config | {"budget_alert_webhook": webhook})
        await ingress.services.budgets.require(key)
        record = completed(
            key_id=key.key_id, card=cost, served=Tier.DEFAULT, usage=TokenUsage(10**6, 0, 0),
            arrived=now_utc(), ingress=ingress.services.registry.ingress,
        )  # fmt: skip
        ingress.services.observers.ended(Ended(record, 200))
        await until(lambda: ingress.services.budget_webhook.counts[Outcome.DELIVERED])
        assert len(receiver.ids) == 2 and len(set(receiver.ids)) == 1
        data = json.loads(receiver.requests[-1][2])["data"]
    assert (data["key_id"], data["percent"], data["spent"]) == (key.key_id, 100, "1")
    assert data["requests_refused"]
    # Without it nothing is sent, and nothing is lost.
    await ingress.reconfigure(config)
    lost = ingress.services.budget_webhook.counts[Outcome.DROPPED]
    other, _ = create_key("acme", created=NOON, budgets=["total=0:warn"])
    await ingress.services.budgets.require(other)
    await until(lambda: ingress.services.budgets.alerts[100, False])
    assert (len(receiver.requests), lost) == (2, 0)


async def test_a_webhook_without_its_secret_changes_nothing(ingress, tmp_path, monkeypatch):
    monkeypatch.delenv("WEBHOOK_SECRET", raising=False)
    config = with_ledger(tmp_path, "one")
    await ingress.reconfigure(config)
    services = ingress.services
    before = (services.settings, services.ledger, services.usage)
    webhook = {"url": "https://example.com/TOKEN", "secret_env": "WEBHOOK_SECRET"}
    bad = with_ledger(tmp_path, "two") | {"budget_alert_webhook": webhook}
    with pytest.raises(SettingsError) as caught:
        await ingress.reconfigure(bad)
    assert str(caught.value).startswith("user_config.budget_alert_webhook.secret_env: ")
    assert "TOKEN" not in str(caught.value)
    assert before == (services.settings, services.ledger, services.usage)


async def test_keys_are_made_in_the_ledger_that_is_in_force(ingress, tmp_path):
    admin, _ = create_key("ops", admin=True, created=NOON)
    for name in ("one", "two"):
        await ingress.reconfigure(with_ledger(tmp_path, name))
        await until(lambda: ingress.services.access.keys_read)
        desk = ingress.services.key_admin
        async with asyncio.timeout(10):
            while True:
                # Until the tables are there.
                try:
                    await desk.create(admin, {"tenant": name})
                    break
                except StoreAway:
                    await asyncio.sleep(0.02)
        assert [key.tenant for key in (await desk.listing())[0]] == [name]
    await ingress.reconfigure(with_ledger(tmp_path, "two", "open"))
    assert ingress.services.key_admin is None


async def test_settings_that_cannot_be_taken_over_change_nothing(ingress, stores, tmp_path):
    """59dfe9e: the same once more was taken for done, with the old ledger."""
    await ingress.reconfigure(with_ledger(tmp_path, "one", "open"))
    services = ingress.services
    before = (services.settings, services.ledger, services.usage)
    (tmp_path / "file").touch()
    bad = with_ledger(tmp_path, "two") | {"journal": {"folder": str(tmp_path / "file" / "sub")}}
    for _ in range(2):
        with pytest.raises(OSError):
            await ingress.reconfigure(bad)
        assert before == (services.settings, services.ledger, services.usage)
        assert services.access is None
    made, closed = stores
    await ingress.reconfigure(with_ledger(tmp_path, "three", "open"))
    await until(lambda: closed)
    assert closed == made[:1], "the store in force was still the first"


async def test_settings_change_without_leaving_anything_behind(stores, tmp_path, monkeypatch):
    made, closed = stores
    ingress, end = Ingress(None), Ingress.__del__
    # Serve awaits it; Python, which cannot, would call it once more.
    monkeypatch.delattr(Ingress, "__del__")

    async def change(ledger="one", folder="a", auth="open"):
        config = {
            "auth": auth,
            "ledger": f"sqlite:///{tmp_path}/{ledger}.db",
            "journal": {"folder": str(tmp_path / folder), "segment_mb": 1},
        }
        await ingress.reconfigure(config)

    await change()
    await change(auth="keys")
    await change(auth="keys", folder="b")
    assert (len(made), closed) == (1, [])
    await change(auth="keys", folder="b", ledger="two")
    async with asyncio.timeout(10):
        while not closed:
            await asyncio.sleep(0.01)
    assert (len(made), closed) == (2, made[:1])
    await end(ingress)
    assert closed == made


async def test_the_access_log_changes_with_the_settings_or_not_at_all(ingress, tmp_path):
    config = with_ledger(tmp_path, "one", "open")
    refused = Refused("req_0", "chat/completions", "", 401, "invalid_api_key")
    await ingress.reconfigure(config)
    ingress.services.observers.refused(refused)
    await until(lambda: (tmp_path / "access.log").read_text().count("\n") == 1)
    (tmp_path / "file").touch()
    unwritable = {"folder": str(tmp_path / "file")}
    for bad in [
        config | {"access_log": unwritable},
        config | {"access_log": {"enabled": False}, "journal": unwritable},
    ]:
        with pytest.raises(OSError):
            await ingress.reconfigure(bad)
    ingress.services.observers.refused(refused)
    await until(lambda: (tmp_path / "access.log").read_text().count("\n") == 2)
    await ingress.reconfigure(config | {"access_log": {"folder": str(tmp_path / "logs")}})
    ingress.services.observers.refused(refused)
    await until(lambda: (tmp_path / "logs" / "access.log").read_text().count("\n") == 1)
    await ingress.reconfigure(config | {"access_log": {"enabled": False}})
    ingress.services.observers.refused(refused)
    assert (tmp_path / "access.log").read_text().count("\n") == 2
    assert (tmp_path / "logs" / "access.log").read_text().count("\n") == 1
