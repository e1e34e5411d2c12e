"""Budgets at ingresses that share one book and one database, each a few lines here."""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from app import alarms
from app.core import errors
from app.store.database import StoreAway
from app.tenants import budget_gate, spending
from app.tenants.budget import Owner, parse_budgets
from app.tenants.budget_gate import BudgetGate
from app.tenants.keys import create_key
from app.tenants.spending import SpendBook
from tests.support.waiting import until

pytestmark = pytest.mark.unit

TODAY = date(2026, 11, 30)
NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
ONE = Decimal(1)


class Book:
    """The ``Limits`` deployment."""

    def __init__(self):
        self.book, self.away, self.asked = SpendBook(), False, 0

    async def spend(self, report):
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise ConnectionError
        return self.book.answer(report, time.monotonic())


class Database:
    """What is spent, by ingress, for whatever is asked."""

    def __init__(self, **parts):
        self.parts = {name: Decimal(part) for name, part in parts.items()}
        self.away, self.reads = False, []

    def spent(self, spend):
        self.reads.append(spend)
        if self.away:
            raise StoreAway("nobody there")
        return dict(self.parts)


class Gate(BudgetGate):
    """With a calendar of its own."""

    def __init__(self, name, book, read, day, **more):
        self.days = [day]
        super().__init__(name, book, read, today=lambda: self.days[0], **more)


def key(*budgets):
    return create_key("acme", budgets=budgets, created=NOON)[0]


@asynccontextmanager
async def gate(name="one", book=None, database=None, day=TODAY, **more):
    made = Gate(name, book or Book(), (database or Database()).spent, day, **more)
    made.start()
    try:
        yield made
    finally:
        await made.stop()


def spend(made, key, cost, day=TODAY):
    made.add(key.key_id, key.tenant, day, Decimal(cost))


async def admits(made, key):
    try:
        await made.require(key)
    except errors.InsufficientQuota as error:
        assert (error.status, error.type, error.code) == (
            429, "insufficient_quota", "insufficient_quota",
        )  # fmt: skip
        return False
    return True


async def shared():
    """Wait until all have reported and received what the others have."""
    await asyncio.sleep(2 * spending.RENEWAL_S + 0.1)


async def test_a_key_without_budgets_asks_nobody():
    book, database = Book(), Database()
    async with gate(book=book, database=database) as made:
        assert await admits(made, None) and await admits(made, key())
        assert (len(made), book.asked, database.reads) == (0, 0, [])


async def test_a_hard_budget_is_refused_once_it_is_spent_and_not_before():
    async with gate(database=Database(dead="0.25")) as made:
        limited = key("month=1")
        spend(made, limited, "0.7499")
        assert await admits(made, limited)
        spend(made, limited, "0.0001")
        assert not await admits(made, limited)
        assert await admits(made, key("month=1"))


async def test_a_warning_never_refuses(caplog):
    async with gate() as made:
        warned = key("day=1:warn")
        for cost, reached in (("0.49", 0), ("0.01", 50), ("0.3", 80), ("5", 100)):
            spend(made, warned, cost)
            assert await admits(made, warned)
            if reached:
                await until(lambda reached=reached: made.alerts[reached, False] == 1)
        assert sum(made.alerts.values()) == 3
    assert "100 % reached, 5.80 of 1 USD spent (day)" in caplog.text
    assert warned.key_id in caplog.text


async def test_alerts_are_told_with_an_id_that_ingresses_and_restarts_agree_on():
    book, limited, told = Book(), key("month=1", "total=100"), []
    database = Database(dead="0.3")
    async with (
        gate("one", book, database, tell=told.append) as one,
        gate("two", book, database, tell=told.append) as two,
    ):
        for made in (one, two):
            assert await admits(made, limited)
        spend(one, limited, "0.3")
        spend(two, limited, "0.25")
        await until(lambda: len([each for each in told if each.percent == 80]) == 2)
    async with gate("three", Book(), Database(dead="0.85"), tell=told.append) as made:
        assert await admits(made, limited)
        await until(lambda: len([each for each in told if each.percent == 80]) == 3)
    assert {each.of.period for each in told} == {"month"}
    assert len({each.id for each in told if each.percent == 80}) == 1
    last = told[-1]
    assert (last.spent, last.budget.usd, last.of.name) == (Decimal("0.85"), ONE, limited.key_id)


async def test_ingresses_know_of_each_other_within_a_moment():
    """An ingress alone, or one that counts only its own, would admit the budget twice."""
    book, limited = Book(), key("total=1")
    async with gate("one", book) as one, gate("two", book) as two:
        for made in (one, two):
            assert await admits(made, limited)
        spend(one, limited, "0.5")
        spend(two, limited, "0.5")
        await shared()
        assert [await admits(made, limited) for made in (one, two)] == [False, False]


async def test_a_stream_that_ends_long_after_the_last_request_is_reported_at_once(monkeypatch):
    monkeypatch.setattr(spending, "ACTIVE_S", 0.01)
    book, limited = Book(), key("month=1")
    async with gate("one", book) as one, gate("two", book) as two:
        assert await admits(one, limited)
        await shared()
        asked = book.asked
        await shared()
        # It is not in use, so it is not reported four times a second.
        assert book.asked == asked
        spend(one, limited, 1)
        await shared()
        assert not await admits(two, limited)


async def test_two_busy_ingresses_overshoot_by_what_is_in_flight_only():
    """Each runs four requests of a cent at once, until it is refused."""
    book, limited, cent = Book(), key("month=1"), Decimal("0.01")
    served = []

    async def client(made):
        while await admits(made, limited):
            await asyncio.sleep(0.02)
            served.append(cent)
            spend(made, limited, cent)

    async with gate("one", book) as one, gate("two", book) as two:
        await asyncio.gather(*(client(made) for made in (one, two) for _ in range(4)))
    # Besides what is in flight, what has ended since the last report: a quarter of a second each,
    # and as much until the other has received it.
    assert ONE <= sum(served) <= ONE + 8 * cent + 2 * 4 * 25 * cent


async def test_the_budgets_of_the_tenant_hold_too():
    async with gate() as made:
        limited = key("day=100")
        other = create_key("acme", created=NOON)[0]
        both = replace(
            limited, budgets=limited.budgets + parse_budgets(["month=1"], Owner.TENANT, "acme")
        )
        spend(made, other, "1")
        assert await admits(made, limited) and not await admits(made, both)
        states = await made.states(both)
        assert [(str(each.budget), each.spent, each.left) for each in states] == [
            ("day=100", 0, 100),
            ("month=1", 1, 0),
        ]
        assert [each.resets for each in states] == [date(2026, 12, 1), date(2026, 12, 1)]


@pytest.mark.parametrize(
    ("period", "ends"), [("day", date(2026, 12, 1)), ("month", date(2026, 12, 1)), ("total", None)]
)
async def test_the_next_period_begins_at_nothing(period, ends):
    database = Database()
    async with gate(database=database) as made:
        limited = key(f"{period}=1")
        spend(made, limited, 2)
        assert not await admits(made, limited)
        made.days[0] = TODAY + timedelta(days=1)
        assert await admits(made, limited) is (ends is not None)
        # A request of the day before that ends now.
        spend(made, limited, 2)
        assert await admits(made, limited) is (ends is not None)


async def test_what_cannot_be_read_at_the_start_lets_nobody_through():
    database = Database(dead=1)
    database.away = True
    before = alarms.PROCESS.counts().get("budgets unread", 0)
    async with gate(database=database) as made:
        limited = key("month=1")
        with pytest.raises(errors.Unavailable) as caught:
            await made.require(limited)
        assert (caught.value.status, caught.value.code) == (503, "budget_unavailable")
        assert int(caught.value.headers["retry-after"]) == 5
        assert made.unread == 1
        assert alarms.PROCESS.counts()["budgets unread"] > before
        assert [each.spent for each in await made.states(limited)] == [None]
        # What only alerts refuses nobody for that.
        assert await admits(made, key("month=1:warn"))
        database.away = False
        await until(lambda: made.unread == 0)
        assert not await admits(made, limited)


async def test_a_period_that_begins_while_the_database_is_away_is_counted_by_reports():
    """Otherwise every key with a budget would get 503 from midnight on."""
    book, database = Book(), Database()
    limited = key("day=1")
    tomorrow = TODAY + timedelta(days=1)
    async with gate("one", book, database) as one, gate("two", book, database) as two:
        assert await admits(one, limited) and await admits(two, limited)
        database.away = True
        one.days[0] = two.days[0] = tomorrow
        for made in (one, two):
            # The first request finds out that the database is away.
            assert await admits(made, limited) and made.unread == 1
        spend(one, limited, 1, tomorrow)
        await shared()
        assert not await admits(two, limited)


async def test_while_the_book_is_away_each_goes_by_what_it_knows(caplog):
    book, limited = Book(), key("month=1")
    async with gate("one", book) as one, gate("two", book) as two:
        spend(one, limited, "0.4")
        assert await admits(one, limited)
        assert await admits(two, limited)
        book.away = True
        await until(lambda: one.away and two.away)
        spend(two, limited, "0.5")
        assert await admits(two, limited)
        spend(two, limited, "0.1")
        # It knew of the other's 0.4; the other does not know of its 0.6.
        assert [await admits(made, limited) for made in (one, two)] == [True, False]
        book.away, book.book = False, SpendBook()
        await until(lambda: not one.away and not two.away)
        await shared()
        assert not await admits(one, limited)
    assert "spend is shared again" in caplog.text


async def test_a_book_that_does_not_answer_holds_up_nobody_for_long():
    class Silent(Book):
        async def spend(self, report):
            await asyncio.Event().wait()

    async with gate(book=Silent(), patience_s=0.05) as made:
        limited = key("month=1")
        async with asyncio.timeout(5):
            assert await admits(made, limited)
        assert made.away
        spend(made, limited, 1)
        assert not await admits(made, limited)


async def test_a_raised_budget_admits_at_once():
    async with gate() as made:
        limited = key("month=1")
        spend(made, limited, 1)
        assert not await admits(made, limited)
        more = replace(limited.budgets[0], usd=Decimal(2))
        assert await admits(made, replace(limited, budgets=(more,)))


async def test_budgets_that_are_not_used_any_more_are_forgotten(monkeypatch):
    monkeypatch.setattr(budget_gate, "FORGET_EVERY_S", 0.0)
    async with gate() as made:
        limited = key("day=1")
        assert await admits(made, limited)
        made.days[0] = TODAY + timedelta(days=1)
        assert await admits(made, key("day=1"))
        await until(lambda: len(made) == 1)
