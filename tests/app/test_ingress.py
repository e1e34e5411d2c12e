import asyncio
import time

import pytest
from sqlalchemy import event

from app.config.ingress import FlightBounds
from app.core import errors
from app.ingress import Ingress
from app.store.database import connect
from app.tenants.access import Caller
from app.tenants.keys import KeyLimits, create_key
from app.tenants.limiter import LimitBooks
from tests.support.records import NOON
from tests.support.waiting import until

pytestmark = pytest.mark.unit


class NoModels:
    """No Serve application, and no Ray to ask."""

    async def applications(self):
        return set()


@pytest.fixture
def stores(monkeypatch):
    """Every engine that the ingress makes, and which of them it has closed."""
    made, closed = [], []

    def noted(url):
        engine = connect(url)
        made.append(engine)
        event.listen(engine, "engine_disposed", closed.append)
        return engine

    async def loopback():
        return "127.0.0.1"

    # It would be of the whole test run.
    monkeypatch.setattr("app.ingress.settle_in", lambda: None)
    monkeypatch.setattr("app.ingress.connect", noted)
    monkeypatch.setattr("app.ingress.serve_host", loopback)
    monkeypatch.setattr("app.ingress.ServeSource", NoModels)
    return made, closed


class Books:
    """The limits' books, which answer once they may."""

    def __init__(self):
        self.books, self.may, self.asked = LimitBooks(), asyncio.Event(), asyncio.Event()

    async def answer(self, asks):
        self.asked.set()
        await self.may.wait()
        return self.books.answer(asks, time.monotonic())


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
