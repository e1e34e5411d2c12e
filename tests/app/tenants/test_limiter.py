import heapq
import itertools
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.tenants.keys import KeyLimits, create_key
from app.tenants.limiter import LimitBooks, Measure, RateLimiter
from app.tenants.window import MINUTE_S
from tests.support.records import NOON

pytestmark = pytest.mark.unit


class Ingress:
    """An ingress with the books beside it."""

    def __init__(self, books, name="i"):
        self.books, self.allowances, self.told = books, RateLimiter(name), {}

    def request(self, key, tokens, now):
        over = self.allowances.take(key, tokens, now)
        if over is not None:
            self.exchange(now)
            over = self.allowances.take(key, tokens, now)
        return over

    def exchange(self, now):
        answers = self.books.answer(self.allowances.asks(now), now)
        self.allowances.receive(answers, now)
        self.told |= answers


def key_with(**limits):
    return create_key("acme", limits=KeyLimits(**limits), created=NOON)[0]


def test_a_key_without_limits_is_never_refused_and_has_no_headers():
    ingress, key = Ingress(LimitBooks()), key_with()
    assert all(ingress.request(key, 10**9, 1000.0) is None for _ in range(100))
    assert ingress.allowances.headers(key, 1000.0) == []
    assert ingress.allowances.next_ask() == float("inf")


def served(ingress, key, tokens, count, pause_s=0.1, start=1000.0):
    outcomes, now = [], start
    for _ in range(count):
        outcomes.append(ingress.request(key, tokens, now))
        now += pause_s
        if ingress.allowances.next_ask() <= now:
            ingress.exchange(now)
    return outcomes


def test_the_limit_that_is_reached_is_named():
    ingress, key = Ingress(LimitBooks()), key_with(rpm=5, tpm=1000)
    outcomes = served(ingress, key, 10, 20)
    assert outcomes[:5] == [None] * 5
    over = outcomes[-1]
    assert (over.measure, over.limit) == (Measure.REQUESTS, 5)
    assert 50 < over.retry_after_s <= 61
    over = served(Ingress(LimitBooks()), key, 400, 20)[-1]
    assert (over.measure, over.limit) == (Measure.TOKENS, 1000)


def test_a_request_without_tokens_left_does_not_count_as_a_request():
    ingress, key = Ingress(LimitBooks()), key_with(rpm=100, tpm=100)
    outcomes = served(ingress, key, 60, 40)
    assert outcomes.count(None) == 1
    headers = dict(ingress.allowances.headers(key, 1004.0))
    assert headers["x-ratelimit-remaining-requests"] == "99"
    assert headers["x-ratelimit-remaining-tokens"] == "40"


def test_tokens_that_were_not_needed_can_be_used():
    ingress, key = Ingress(LimitBooks()), key_with(tpm=1000)
    assert ingress.request(key, 1000, 1000.0) is None
    assert ingress.request(key, 1000, 1000.3) is not None
    ingress.allowances.put_right(key, 1000, 10, 0.5, 1000.5)
    ingress.exchange(1001.0)
    outcomes = served(ingress, key, 900, 10, start=1002.0)
    assert outcomes.count(None) == 1


def test_a_limit_that_is_changed_holds_at_once():
    books = LimitBooks()
    ingress, key = Ingress(books), key_with(rpm=2)
    assert served(ingress, key, 1, 10).count(None) == 2
    more = key_with(rpm=6)
    object.__setattr__(more, "key_id", key.key_id)
    assert served(ingress, more, 1, 10, start=1002.0).count(None) == 4


def test_keys_do_not_share_limits_and_ingresses_do():
    books = LimitBooks()
    one, two = Ingress(books, "one"), Ingress(books, "two")
    key, other = key_with(rpm=4), key_with(rpm=4)
    outcomes = served(one, key, 1, 10) + served(two, key, 1, 10, start=1001.0)
    assert outcomes.count(None) == 4
    assert served(two, other, 1, 10, start=1002.0).count(None) == 4


def test_books_that_nobody_uses_are_forgotten():
    books = LimitBooks()
    ingress = Ingress(books)
    served(ingress, key_with(rpm=4), 1, 3)
    assert len(books.names) == 1
    for at in range(1010, 1600, 10):
        ingress.exchange(float(at))
    assert len(books.names) == 0


def test_a_key_that_was_forgotten_has_its_whole_limit_again():
    books, key, other = LimitBooks(), key_with(rpm=4), key_with(rpm=4)
    ingress = Ingress(books)
    for minute in range(3):
        assert served(ingress, key, 1, 10, start=1000.0 + 70 * minute).count(None) == 4
    for at in range(1300, 1900, 10):
        # The books forget while others speak.
        ingress.request(other, 1, float(at))
        ingress.exchange(float(at))
    assert books.names == [f"{other.key_id}/requests"]
    assert served(ingress, key, 1, 10, start=1900.0).count(None) == 4


@settings(max_examples=40)
@given(st.data(), st.integers(1, 6), st.integers(1, 2))
def test_forgetting_lets_no_more_through(data, limit, ingresses):
    """Keys are used and left, for minutes, at ingresses that forget and books that forget."""
    books = LimitBooks()
    all_of_them = [Ingress(books, f"i{number}") for number in range(ingresses)]
    keys = [key_with(rpm=limit, tpm=10 * limit) for _ in range(3)]
    now, taken = 1000.0, {key.key_id: [] for key in keys}
    running = []
    for _ in range(data.draw(st.integers(1, 12))):
        key = data.draw(st.sampled_from(keys))
        ingress = data.draw(st.sampled_from(all_of_them))
        for _ in range(data.draw(st.integers(1, 2 * limit))):
            now += 0.2
            if ingress.request(key, 10, now) is None:
                taken[key.key_id].append(now)
                running.append((ingress, key, now))
        idle_until = now + data.draw(st.sampled_from([0.5, 30, 70, 140, 400]))
        while now < idle_until:
            now += 0.5
            for one in all_of_them:
                if one.allowances.next_ask() <= now:
                    one.exchange(now)
        for one, ended, began in running:
            one.allowances.put_right(ended, 10, data.draw(st.sampled_from([0, 10])), now - began,
                                     now)  # fmt: skip
        running = []
    for times in taken.values():
        for at in times:
            assert sum(at - MINUTE_S < other <= at for other in times) <= limit


def test_keys_that_are_gone_are_forgotten():
    """59dfe9e: 1,000 keys that were used once were remembered for ever."""
    books = LimitBooks()
    ingress, other = Ingress(books), key_with(rpm=4)
    for number in range(1000):
        assert ingress.request(key_with(rpm=4, tpm=10), 1, 1000.0 + number / 100) is None
    for at in range(2020, 2600):
        ingress.request(other, 1, at / 2)
        ingress.exchange(at / 2)
    assert len(ingress.allowances) == 1
    assert books.names == [f"{other.key_id}/requests"]
    assert ingress.told[f"{other.key_id}/requests"].ingresses == 1


class Requests:
    """Clients of one key at some ingresses, whose asks take their time; all time is made up.

    As ``app.tenants.access`` does, a request that is not admitted is tried again with each answer.
    """

    def __init__(self, seed, latency_s, pause_s, ingresses, key):
        self.chance, self.latency_s, self.pause_s = random.Random(seed), latency_s, pause_s
        self.books, self.key, self.longest_s, self.now = LimitBooks(), key, 0.0, 1000.0
        self.ingresses = [RateLimiter(f"i{n}") for n in range(ingresses)]
        self.waiting = [[] for _ in self.ingresses]
        self.asking = [False] * ingresses
        self.events, self.order = [], itertools.count()

    def after(self, wait_s, event, *arguments):
        entry = (self.now + wait_s, next(self.order), partial(event, *arguments))
        heapq.heappush(self.events, entry)

    def run(self, clients, seconds):
        for _ in range(clients):
            self.after(self.chance.uniform(0, self.pause_s), self.come)
        while self.events and self.events[0][0] < 1000 + seconds:
            self.now, _, event = heapq.heappop(self.events)
            event()
        for came, _ in itertools.chain(*self.waiting):
            self.longest_s = max(self.longest_s, self.now - came)
        return self.longest_s

    def come(self):
        number = self.chance.randrange(len(self.ingresses))
        self.waiting[number].append((self.now, self.chance.choice((5, 35, 400))))
        self.admit(number)

    def admit(self, number):
        waiting, self.waiting[number] = self.waiting[number], []
        for came, tokens in waiting:
            if self.ingresses[number].take(self.key, tokens, self.now) is None:
                self.longest_s = max(self.longest_s, self.now - came)
                self.after(self.chance.expovariate(2), self.end, number, tokens, self.now)
            else:
                self.waiting[number].append((came, tokens))
        self.ask(number)

    def end(self, number, tokens, began):
        used = self.chance.randint(0, tokens)
        age_s = self.now - began
        self.ingresses[number].put_right(self.key, tokens, used, age_s, self.now)
        self.after(self.chance.expovariate(1 / self.pause_s), self.come)
        self.ask(number)

    def ask(self, number):
        due = self.ingresses[number].next_ask()
        if self.asking[number] or due == float("inf"):
            return
        if due > self.now:
            self.after(due - self.now + 1e-6, self.ask, number)
            return
        self.asking[number] = True
        self.after(self.on_the_way(), self.answer, number, self.ingresses[number].asks(self.now))

    def answer(self, number, asks):
        self.after(self.on_the_way(), self.receive, number, self.books.answer(asks, self.now))

    def receive(self, number, answers):
        self.asking[number] = False
        self.ingresses[number].receive(answers, self.now)
        self.admit(number)

    def on_the_way(self):
        return self.chance.uniform(0, self.latency_s / 2)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    latency_s=st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    pause_s=st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    clients=st.sampled_from([1, 2, 6]),
    ingresses=st.integers(1, 2),
)
def test_where_there_is_room_nobody_waits_for_more_than_a_few_answers(
    seed, latency_s, pause_s, clients, ingresses
):
    key = key_with(rpm=10**6, tpm=10**9)
    waited_s = Requests(seed, latency_s, pause_s, ingresses, key).run(clients, 90)
    assert waited_s < 4 * latency_s + 0.1
