"""Spend over several ingresses, with the book and the database between them, all simulated."""

from datetime import date, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.tenants.budget import Budget, Owner, Period
from app.tenants.spending import (
    ALERTS,
    GONE_S,
    REREAD_S,
    OwnSpend,
    SpendBook,
    SpendReport,
    Watch,
    level,
    total,
)

pytestmark = pytest.mark.unit

TODAY = date(2026, 11, 30)
LIMIT = Budget(Owner.KEY, "k1", Period.MONTH, Decimal(10))
SPEND = LIMIT.at(TODAY)
costs = st.decimals("0.01", 4, places=2)
who = st.integers(0, 2)


class Ingress:
    """What an ingress knows, its running requests, and its records that are not moved yet."""

    def __init__(self, name, now):
        self.name, self.own = name, OwnSpend()
        self.watch = Watch(LIMIT, SPEND, now)
        self.running, self.unmoved = [], []

    @property
    def spent(self):
        return self.watch.spent(self.name, self.own.of(SPEND))


class Spending(RuleBasedStateMachine):
    """Whatever is late, lost, repeated or restarted: no view exceeds what was spent, and a view
    that has just been renewed lacks nothing but what runs."""

    def __init__(self):
        super().__init__()
        self.now, self.made = 0.0, 0
        self.book, self.database = SpendBook(), {}
        self.ingresses = [self.new() for _ in range(3)]
        self.dead, self.sent, self.answers = [], [], []
        self.settled = Decimal(0)

    def new(self):
        self.made += 1
        return Ingress(f"i{self.made}", self.now)

    @rule(i=who, cost=costs)
    def admit(self, i, cost):
        """As the product does: with an answer to a report that was just sent, or not at all."""
        one = self.ingresses[i]
        self.renew()
        unseen = self.settled - one.spent
        assert unseen == 0
        if one.spent < LIMIT.usd:
            one.running.append(cost)

    def renew(self):
        """Every ingress reports, reads and is answered, as it does when all works."""
        for dead in self.dead:
            self.move(dead)
        for _ in range(2):
            for one in self.ingresses:
                began, self.now = self.now, self.now + 0.01
                one.watch.was_read(dict(self.database), one.name, began, self.now)
                report = SpendReport(one.name, {SPEND: one.own.of(SPEND)})
                answer = self.book.answer(report, self.now)
                one.watch.answered(answer[SPEND], one.name, self.now)

    @rule(i=who)
    def settle(self, i):
        one = self.ingresses[i]
        if one.running:
            self.end(one, one.running.pop())
            one.own.add("k1", "acme", TODAY, self.last)

    def end(self, one, cost):
        self.last = cost
        self.settled += cost
        one.unmoved.append(cost)

    @rule(i=who)
    def move_records(self, i):
        self.move(self.ingresses[i])

    def move(self, one):
        known = self.database.get(one.name, Decimal(0))
        self.database[one.name] = total([known, *one.unmoved])
        one.unmoved = []

    @rule(i=who)
    def read(self, i):
        one = self.ingresses[i]
        one.watch.was_read(dict(self.database), one.name, self.now, self.now)

    @rule(i=who)
    def report(self, i):
        one = self.ingresses[i]
        self.sent.append((one.name, SpendReport(one.name, {SPEND: one.own.of(SPEND)})))

    @rule(data=st.data(), seconds=st.sampled_from([0.1, 1.0, GONE_S / 2]))
    def deliver(self, data, seconds):
        """Messages stay on their way, so they come again, in any order, or never."""
        self.now += seconds
        if self.sent:
            name, report = data.draw(st.sampled_from(self.sent))
            self.answers.append((name, self.book.answer(report, self.now)[SPEND]))

    @rule(data=st.data())
    def hear(self, data):
        if self.answers:
            name, answer = data.draw(st.sampled_from(self.answers))
            for one in self.ingresses:
                if one.name == name:
                    one.watch.answered(answer, name, self.now)

    @rule()
    def lose_the_book(self):
        self.book = SpendBook()

    @rule(i=who)
    def kill(self, i):
        """Its streams are interrupted: another ingress records them from its journal."""
        one = self.ingresses[i]
        for cost in one.running:
            self.end(one, cost)
        one.running = []
        self.dead.append(one)
        self.ingresses[i] = self.new()

    @invariant()
    def nobody_counts_too_much(self):
        assert all(one.spent <= self.settled for one in self.ingresses)

    def teardown(self):
        self.renew()
        assert {one.spent for one in self.ingresses} == {self.settled}


Spending.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestSpending = pytest.mark.unit(Spending.TestCase)


@settings(max_examples=40)
@given(st.lists(st.tuples(who, st.integers(0, 4), costs), max_size=30), st.data())
def test_a_budget_is_overshot_by_no_more_than_what_is_in_flight(steps, data):
    """Each ingress learns before it admits; what runs is not known yet."""
    machine, most = Spending(), Decimal(0)
    for i, ends, cost in steps:
        before = sum(len(one.running) for one in machine.ingresses)
        spent = machine.settled
        machine.admit(i, cost)
        running = [cost for one in machine.ingresses for cost in one.running]
        # Over the budget nobody is admitted, whatever runs.
        assert spent < LIMIT.usd or len(running) == before
        most = max(most, total(running))
        for _ in range(ends):
            machine.settle(data.draw(who))
    assert machine.settled <= LIMIT.usd + most


@given(
    st.lists(st.tuples(st.integers(-40, 40), costs), max_size=20),
    st.sampled_from(Period),
    st.sampled_from([(Owner.KEY, "k"), (Owner.TENANT, "acme")]),
)
def test_own_spend_is_that_of_the_present_period(spends, period, of):
    own, latest = OwnSpend(), TODAY
    for offset, cost in spends:
        day = TODAY + timedelta(days=offset)
        latest = max(latest, day)
        own.add("k", "acme", day, cost)
    owner, name = of
    spend = Budget(owner, name, period, Decimal(1)).at(latest)
    # A request of a period that was over when it ended is not counted, nor is it needed.
    expected, newest = [], None
    for offset, cost in spends:
        start = period.start(TODAY + timedelta(days=offset))
        if newest is None or start is None or start >= newest:
            newest = start
            if start == spend.start:
                expected.append(cost)
    assert own.of(spend) == sum(expected)
    assert own.of(Budget(Owner.KEY, "other", period, Decimal(1)).at(latest)) == 0


def test_a_view_knows_nothing_before_the_database_was_read():
    watch = Watch(LIMIT, SPEND, 0.0)
    watch.answered({"other": Decimal(3)}, "me", 1.0)
    assert not watch.known and watch.is_fresh(1.2) and not watch.is_fresh(2.0)
    assert watch.read_due(1.0) <= 1.0
    watch.was_not_read(1.0)
    assert watch.read_failed and 1.0 < watch.read_due(1.0) < 1.0 + REREAD_S
    watch.was_read({"other": Decimal(2), "me": Decimal(1)}, "me", 3.0, 3.5)
    assert watch.known and not watch.read_failed and watch.spent("me", Decimal(0)) == 4
    # A database that takes half a second to add it up is not asked all the time.
    assert watch.read_due(4.0) >= 3.5 + REREAD_S
    assert watch.read_due(1e6) == float("inf")


def test_the_book_forgets_what_nobody_reports():
    book = SpendBook()
    book.answer(SpendReport("a", {SPEND: Decimal(1)}), 0.0)
    assert book.answer(SpendReport("b", {SPEND: Decimal(2)}), 1.0) == {
        SPEND: {"a": Decimal(1), "b": Decimal(2)}
    }
    assert book.answer(SpendReport("b", {SPEND: Decimal(2)}), GONE_S + 0.5) == {
        SPEND: {"b": Decimal(2)}
    }
    book.answer(SpendReport("a", {}), 3 * GONE_S)
    assert len(book) == 0


@given(st.decimals(0, 1000, places=3), st.decimals(0, 10, places=3))
def test_alerts_are_at_their_percentages_exactly(spent, usd):
    reached = [each for each in ALERTS if usd == 0 or spent / usd >= Decimal(each) / 100]
    assert level(spent, usd) == max(reached, default=0)


def test_a_watch_ends_with_its_period_or_unused():
    watch = Watch(LIMIT, SPEND, 0.0)
    assert not watch.is_over(TODAY, 10.0)
    assert watch.is_over(SPEND.end, 10.0)
    assert watch.is_over(TODAY, 4000.0)
