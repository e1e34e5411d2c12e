import copy
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import RateLimited
from app.tenants.allowance import (
    Allowance,
    LimitState,
    duration,
    rate_limit_headers,
    split_limit,
)
from app.tenants.rate_limit import LEASE_S, RENEWAL_S, Ask, LimitBook
from app.tenants.window import MINUTE_S

pytestmark = pytest.mark.unit

STEP_S = 0.05


class Net:
    """Ingresses and one book, with messages that are late, lost or repeated."""

    def __init__(self, seed, limit, ingresses, *, loss=0.0, delay_s=0.0):
        self.random = random.Random(seed)
        self.book, self.limit = LimitBook(), limit
        self.loss, self.delay_s = loss, delay_s
        self.allowances = {i: Allowance(f"i{i}", limit) for i in range(ingresses)}
        self.now, self.messages, self.taken = 1000.0, [], []
        self.cut_off = set()
        self.patient = []

    def request(self, ingress, amount=1):
        """Take, or wait for the answer to one ask and try again, as an ingress does."""
        if not self.take(ingress, amount):
            self.patient.append((ingress, amount))

    def take(self, ingress, amount=1):
        done = self.allowances[ingress].take(amount, self.now)
        if done:
            self.taken.append([self.now, amount])
        return done

    def step(self):
        self.now += STEP_S
        for ingress, allowance in self.allowances.items():
            if allowance.asks_at() <= self.now:
                self._send(ingress, allowance.ask(self.now))
        while due := [message for message in self.messages if message[0] <= self.now]:
            self.messages = [message for message in self.messages if message[0] > self.now]
            for _, ingress, message in due:
                if not hasattr(message, "answers"):
                    self._send(ingress, self.book.answer(message, self.now))
                elif ingress in self.allowances:
                    self.allowances[ingress].receive(message, self.now)
        patient, self.patient = self.patient, []
        for ingress, amount in patient:
            if ingress in self.allowances:
                self.take(ingress, amount)

    def _send(self, ingress, message):
        for _ in range(1 + (self.random.random() < self.loss / 4)):
            if self.random.random() >= self.loss and ingress not in self.cut_off:
                late = self.now + self.random.random() * self.delay_s
                self.messages.append((late, ingress, message))

    def most_in_a_minute(self):
        most = total = first = 0
        for last, (at, amount) in enumerate(self.taken):
            total += amount
            while self.taken[first][0] <= at - MINUTE_S:
                total -= self.taken[first][1]
                first += 1
            most = max(most, total)
            assert last >= first
        return most


def renew(book, allowance, now):
    allowance.receive(book.answer(allowance.ask(now), now), now)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    limit=st.integers(1, 400),
    ingresses=st.integers(1, 4),
    loss=st.sampled_from([0.0, 0.2, 0.6]),
    delay_s=st.sampled_from([0.0, 0.3, 4.0]),
    rate=st.floats(0.1, 30),
)
def test_no_minute_ever_has_more_than_the_limit(seed, limit, ingresses, loss, delay_s, rate):
    net = Net(seed, limit, ingresses, loss=loss, delay_s=delay_s)
    for step in range(int(150 / STEP_S)):
        if step % 200 == 0:
            net.cut_off = {i for i in net.allowances if net.random.random() < loss / 3}
        if net.random.random() < loss / 2000:
            # An ingress is killed, and another takes its place under a new name.
            place = net.random.choice(list(net.allowances))
            del net.allowances[place]
            net.allowances[len(net.taken) + 1000 + step] = Allowance(f"n{step}", limit)
        for ingress in net.allowances:
            if net.random.random() < rate * STEP_S:
                net.request(ingress)
        net.step()
    assert net.most_in_a_minute() <= limit


@pytest.mark.parametrize("ingresses", [1, 2, 4])
@pytest.mark.parametrize("skew", [False, True])
def test_nearly_all_of_the_limit_can_be_used(ingresses, skew):
    """Twice the limit is asked for, evenly or by one ingress after the other, for four minutes."""
    limit = 600
    net = Net(1, limit, ingresses, delay_s=0.01)
    for _ in range(int(240 / STEP_S)):
        favoured = int(net.now / 7) % ingresses
        for ingress in net.allowances:
            share = float(ingress == favoured) if skew else 1 / ingresses
            for _ in range(4):
                if net.random.random() < limit / MINUTE_S / 2 * share * STEP_S:
                    net.request(ingress)
        net.step()
    assert net.most_in_a_minute() <= limit
    # Four minutes hold four limits; the window counts by whole seconds, a sixtieth too long.
    assert len(net.taken) >= 4 * limit * 0.95


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), ingresses=st.integers(1, 3), limit=st.integers(2000, 20_000))
def test_tokens_are_put_right_when_a_request_ends(seed, ingresses, limit):
    """Requests expect more than they use, for seconds or minutes; what they use is limited."""
    net = Net(seed, limit, ingresses, delay_s=0.05)
    running = []
    for _ in range(int(200 / STEP_S)):
        for ingress in net.allowances:
            expected = net.random.randrange(1, 3000)
            if net.random.random() < 4 * STEP_S and net.take(ingress, expected):
                lasts = net.random.choice([0.5, 5, 40, 90])
                used = net.random.randrange(min(expected, limit) + 1)
                net.taken[-1][1] = used
                back = used - min(expected, limit)
                running.append((net.now + lasts, lasts, ingress, back))
        for entry in [entry for entry in running if entry[0] <= net.now]:
            running.remove(entry)
            net.allowances[entry[2]].put_right(entry[3], entry[1], net.now)
        net.step()
    assert 0 < net.most_in_a_minute() <= limit


def test_a_request_that_used_more_than_expected_is_made_up_for():
    net = Net(1, 1000, 1)
    assert not net.take(0, 100)
    net.step()
    assert net.take(0, 100)
    net.allowances[0].put_right(1900, 1.0, net.now)
    # Two limits were used.
    for _ in range(int(110 / STEP_S)):
        net.step()
        assert not net.take(0, 1)
    for _ in range(int(20 / STEP_S)):
        net.step()
        net.take(0, 1)
    assert len(net.taken) > 1


def test_a_request_larger_than_the_limit_needs_all_of_it():
    net = Net(1, 100, 1)
    net.take(0, 10**6)
    net.step()
    assert net.take(0, 10**6)
    net.step()
    assert not net.take(0, 1)


def test_large_requests_do_not_hold_up_each_other():
    net = Net(1, 6000, 2)
    done = []
    for step in range(int(200 / STEP_S)):
        done += [step * STEP_S for ingress in net.allowances if net.take(ingress, 5000)]
        net.step()
    assert len(done) >= 3
    assert all(later - earlier <= MINUTE_S + 3 for earlier, later in pairwise(done))


def test_an_allowance_ends_when_nobody_renews_it():
    net = Net(1, 1000, 1)
    for _ in range(40):
        net.take(0)
        net.step()
    assert net.take(0)
    net.cut_off = {0}
    net.messages.clear()
    ended = net.now + LEASE_S + 0.5
    while net.now < ended:
        net.step()
    assert not net.take(0)


def test_a_book_that_nobody_uses_can_be_forgotten():
    net = Net(1, 10, 1)
    net.take(0)
    net.step()
    assert net.take(0)
    net.step()
    assert not net.book.is_idle(net.now + 1)
    # What it held is counted when its silence is noticed, and then for a minute.
    assert not net.book.is_idle(net.now + 200)
    assert net.book.is_idle(net.now + 300)


def test_a_book_that_is_new_does_not_count_what_was_used_of_the_one_before():
    net = Net(1, 10, 1)
    for _ in range(15):
        net.request(0)
        for _ in range(160):
            net.step()
    assert len(net.taken) == 15
    net.book = LimitBook()
    for _ in range(10):
        net.request(0)
        net.step()
        net.step()
    for _ in range(20):
        net.step()
    assert len(net.taken) == 25, "a whole limit of the new book's"
    assert not net.take(0)


def test_what_headers_say():
    net = Net(1, 10, 1)
    assert net.allowances[0].standing(net.now) == LimitState(10, 10, 0.0, 0.0)
    net.take(0)
    net.step()
    for _ in range(3):
        assert net.take(0)
        for _ in range(20):
            net.step()
    standing = net.allowances[0].standing(net.now)
    assert (standing.limit, standing.remaining) == (10, 7)
    assert 55 < standing.reset_in_s <= 61
    headers = dict(rate_limit_headers(standing, None))
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-remaining-requests"] == "7"
    assert set(headers) == {
        f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")
    }


def test_a_refused_request_is_told_when_to_come_back():
    net = Net(1, 2, 1)
    for _ in range(40):
        net.take(0)
        net.step()
    assert len(net.taken) == 2
    wait_s = net.allowances[0].standing(net.now).frees_in_s
    error = RateLimited("requests", 2, wait_s)
    assert error.status == 429
    assert error.to_dict()["error"]["code"] == "rate_limit_exceeded"
    assert error.to_dict()["error"]["type"] == "requests"
    assert int(error.headers["retry-after"]) == math.ceil(wait_s)
    back = net.now + wait_s + 1
    while net.now < back:
        net.take(0)
        net.step()
    assert len(net.taken) > 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0171, "18ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"),
     (-1, "0ms"), (86.4, "1m26.4s")],
)  # fmt: skip
def test_durations_read_as_openais(seconds, text):
    assert duration(seconds) == text


def test_what_an_ingress_held_cannot_be_used_once_others_may_have_it():
    """Cut off for a minute, it finds its allowance at an end, which the book has given again."""
    book, one, other = LimitBook(), Allowance("one", 100), Allowance("other", 100)

    def take_all(allowance, now):
        assert not allowance.take(100, now)
        renew(book, allowance, now)

    take_all(one, 1000.0)
    # The book is told by the other's ask that it has not heard from the first.
    take_all(other, 1000.0 + 3 * LEASE_S)
    assert not other.take(100, 1000.0 + 3 * LEASE_S)
    later = 1000.0 + 4 * LEASE_S + MINUTE_S
    take_all(other, later)
    assert other.take(100, later)
    assert not one.take(1, later)


def test_an_ingress_on_its_own_keeps_to_its_part():
    assert [split_limit(100, n) for n in (0, 1, 3, 1000)] == [100, 100, 33, 1]


def test_an_answer_refuses_nothing_to_who_came_after_its_ask():
    book, one = LimitBook(), Allowance("one", 100)
    early = one.ask(1000.0)
    assert early.wanted == 0
    assert not one.take(1, 1000.1)
    one.receive(book.answer(early, 1000.2), 1000.2)
    assert not one.is_refused(1, 1000.2) and one.asks_at() <= 1000.2
    renew(book, one, 1000.2)
    assert one.take(1, 1000.2)


def test_all_who_came_before_an_ask_are_asked_for():
    book, one = LimitBook(), Allowance("one", 100)
    assert not any(one.take(amount, 1000.0) for amount in (5, 30, 20))
    ask = one.ask(1000.0)
    assert (ask.wanted, ask.least) == (55, 5)
    one.receive(book.answer(ask, 1000.0), 1000.0)
    assert all(one.take(amount, 1000.0) for amount in (5, 30, 20))


def test_a_large_one_that_is_refused_refuses_no_small_one():
    book, other, one = LimitBook(), Allowance("other", 100), Allowance("one", 100)
    assert not other.take(60, 1000.0)
    renew(book, other, 1000.0)
    assert other.take(60, 1000.0)
    renew(book, other, 1000.3)

    assert not one.take(50, 1000.4)
    renew(book, one, 1000.4)
    assert not one.take(50, 1000.4) and one.is_refused(50, 1000.4)
    assert not one.take(10, 1000.5) and not one.is_refused(10, 1000.5)
    assert not one.take(50, 1000.5)
    renew(book, one, 1000.5)
    assert one.take(10, 1000.5)
    assert one.is_refused(50, 1000.5) and not one.is_refused(5, 1000.5)


def test_what_was_given_for_a_large_one_and_is_too_little_is_soon_there_for_others():
    book, other, one = LimitBook(), Allowance("other", 100), Allowance("one", 100)
    assert not other.take(30, 1000.0)
    renew(book, other, 1000.0)
    assert other.take(30, 1000.0)

    assert not one.take(5, 1000.0) and not one.take(90, 1000.0)
    renew(book, one, 1000.0)
    assert one.take(5, 1000.0)
    assert not one.take(90, 1000.0) and one.is_refused(90, 1000.0)
    assert one.asks_at() < 1000.0 + RENEWAL_S / 5
    renew(book, one, one.asks_at())

    assert not other.take(50, 1000.1)
    renew(book, other, 1000.1)
    assert other.take(50, 1000.1)


def test_nothing_is_held_for_what_is_refused():
    book, one = LimitBook(), Allowance("one", 100)
    now = 1000.0
    for _ in range(40):
        now += RENEWAL_S
        one.take(1000, now)
        renew(book, one, now)
        # The first got the whole limit; the others were all refused.
        one.take(1000, now)
    assert one.ask(now).wanted <= 1


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    ingresses=st.integers(1, 3),
    limit=st.integers(100, 2000),
    factor=st.sampled_from([1, 3, 30]),
    lasts=st.sampled_from([[0.5], [5, 40], [0.5, 90, 200]]),
)
def test_a_debt_is_paid_however_large_and_late_it_is(seed, ingresses, limit, factor, lasts):
    """Requests use up to ``factor`` times what was expected. 59dfe9e: each minute began anew."""
    net = Net(seed, limit, ingresses, delay_s=0.05)
    running, ended, used, began = [], [], 0, None
    for _ in range(int(300 / STEP_S)):
        for entry in [entry for entry in running if entry[0] <= net.now]:
            running.remove(entry)
            _, took, ingress, expected, actual = entry
            net.allowances[ingress].put_right(actual - expected, took, net.now)
            ended.append((net.now, actual))
        while ended and ended[0][0] < net.now - 2:
            used += ended.pop(0)[1]
        for ingress in net.allowances:
            expected = net.random.randrange(1, max(2, limit // 5))
            if net.random.random() < STEP_S and net.take(ingress, expected):
                began = net.now if began is None else began
                # What has ended two seconds ago is known everywhere.
                assert used <= limit * ((net.now - began) / MINUTE_S + 1)
                took, actual = net.random.choice(lasts), net.random.randrange(factor * expected + 1)
                running.append((net.now + took, took, ingress, expected, actual))
        net.step()
    assert began is not None


def is_forgotten(net, ingress):
    """Whether the book takes an ask for new whose number it has had from this ingress."""
    ask = Ask(
        ingress, 1, net.now, 2 * net.limit, used=0, returned=0, held=0, wanted=1, least=1,
        overdrawn=0, heard_used=0, heard_overdrawn=0,
    )  # fmt: skip
    return copy.deepcopy(net.book).answer(ask, net.now).added == 1


def test_an_ingress_that_a_book_has_forgotten_owes_what_no_book_has_heard_of():
    """59dfe9e: a request that ended two minutes after the last one owed nothing."""
    net = Net(1, 1000, 2)
    net.request(0, 100)
    for _ in range(int(200 / STEP_S)):
        net.request(1, 1)
        net.step()
    assert [is_forgotten(net, name) for name in ("i0", "i1")] == [True, False]
    net.allowances[0].put_right(5000, 199.0, net.now)
    taken = 0
    for _ in range(int(200 / STEP_S)):
        taken += net.take(1, 1)
        net.step()
    assert taken < 50, "what it held already; five limits are owed"
