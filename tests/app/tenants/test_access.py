import asyncio
import random
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from app import alarms
from app.core import errors
from app.core.tier_decision import ALL_RIGHTS
from app.core.tiers import Tier
from app.tenants.access import NOBODY, Access
from app.tenants.keys import KeyLimits, KeyTable, create_key
from app.tenants.limiter import LimitBooks

pytestmark = pytest.mark.unit


class Books:
    """The books, as far away as the test wants them."""

    def __init__(self, books=None, late_s=lambda: 0.001):
        self.books = books or LimitBooks()
        self.late_s = late_s
        self.away = self.silent = False
        self.asked = 0

    async def answer(self, asks):
        self.asked += 1
        await asyncio.sleep(3600 if self.silent else self.late_s())
        if self.away:
            raise ConnectionError
        given = self.books.answer(asks, asyncio.get_running_loop().time())
        await asyncio.sleep(self.late_s())
        return given


class Keys:
    def __init__(self, *keys):
        self.keys = keys

    def table(self):
        return KeyTable.of(self.keys)


def key(**more):
    limits = KeyLimits(
        **{name: more.pop(name) for name in ("rpm", "tpm", "priority_share") if name in more}
    )
    return create_key("acme", limits=limits, created=datetime.now(UTC), **more)


@asynccontextmanager
async def access(*keys, books=None, ingress="one", ingresses=1, **times):
    made = Access(ingress, Keys(*keys), books or Books(), lambda: ingresses, **times)
    made.start()
    try:
        yield made
    finally:
        await made.stop()


async def admitted(made, caller, requests, tokens=1):
    count = 0
    for _ in range(requests):
        try:
            await made.charge(caller, tokens)
        except errors.RateLimited:
            continue
        count += 1
    return count


async def test_a_key_is_found_by_its_text():
    stored, text = key(default_tier=Tier.FLEX)
    async with access(stored) as made:
        caller = await made.identify(f"Bearer {text}")
        assert (caller.tenant, caller.key_id) == ("acme", stored.key_id)
        assert caller.default_tier is Tier.FLEX
        for bad in (None, "", "Bearer ", "Basic x", f"Bearer {text}0", f"Bearer {text[:-1]}x"):
            with pytest.raises(errors.InvalidKey):
                await made.identify(bad)


async def test_a_limit_holds_and_says_what_it_is():
    stored, text = key(rpm=5)
    async with access(stored) as made:
        caller = await made.identify(f"Bearer {text}")
        assert await admitted(made, caller, 8) == 5
        with pytest.raises(errors.RateLimited) as caught:
            await made.charge(caller, 1)
        headers = caught.value.headers
        assert headers["x-ratelimit-limit-requests"] == "5"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert int(headers["retry-after"]) > 30
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")


@asynccontextmanager
async def two_ingresses(rpm):
    """Give two ingresses, each with the caller of one key as it knows it, and their books."""
    stored, text = key(rpm=rpm)
    books = Books()
    async with (
        access(stored, books=books) as one,
        access(stored, books=books, ingress="two") as two,
    ):
        yield [(made, await made.identify(f"Bearer {text}")) for made in (one, two)], books


async def test_a_limit_holds_across_ingresses_together():
    async with two_ingresses(rpm=40) as (both, _):
        counts = await asyncio.gather(*(admitted(made, caller, 60) for made, caller in both))
    assert 38 <= sum(counts) <= 40
    assert min(counts) >= 5


async def test_tokens_are_put_right_when_a_request_has_ended():
    stored, text = key(tpm=100)
    async with access(stored) as made:
        caller = await made.identify(f"Bearer {text}")
        assert await admitted(made, caller, 3, tokens=50) == 2
        made.put_right(caller, 50, 0, 0.1)
        await asyncio.sleep(0.6)
        assert await admitted(made, caller, 2, tokens=50) == 1


async def test_while_the_books_are_away_an_ingress_keeps_to_its_own_part(caplog, monkeypatch):
    monkeypatch.setattr(alarms, "PROCESS", alarms.Alarms())
    stored, text = key(rpm=10)
    books = Books()
    async with access(stored, books=books) as made:
        caller = await made.identify(f"Bearer {text}")
        books.away = True
        assert await admitted(made, caller, 1500) == 10
        assert made.limits_away
        assert dict(made.headers(caller))["x-ratelimit-remaining-requests"] == "0"
    assert caplog.text.count("limits away: each ingress keeps to its own part") == 1


async def test_the_part_of_an_ingress_is_that_of_as_many_as_there_were():
    async with two_ingresses(rpm=40) as (both, books):
        for _ in range(2):
            for made, caller in both:
                await made.charge(caller, 1)
            await asyncio.sleep(0.3)
        books.away = True
        counts = [await admitted(made, caller, 100) for made, caller in both]
    assert sum(counts) <= 40
    assert min(counts) >= 16


async def test_an_ingress_that_never_used_a_limit_takes_no_more_than_its_part_of_it():
    stored, text = key(rpm=40)
    books = Books()
    books.away = True
    async with access(stored, books=books, ingresses=4) as made:
        caller = await made.identify(f"Bearer {text}")
        assert await admitted(made, caller, 100) == 10


async def test_what_is_refused_while_the_books_are_away_leaves_nothing_to_take():
    stored, text = key(rpm=100, tpm=50)
    books = Books()
    books.away = True
    async with access(stored, books=books) as made:
        caller = await made.identify(f"Bearer {text}")
        assert await admitted(made, caller, 30, tokens=20) == 2
        books.away = False
        await asyncio.sleep(0.6)
        # Each refused one had taken a request, and given it back.
        assert await admitted(made, caller, 200, tokens=0) == 98


@asynccontextmanager
async def silent_books(rpm=5, **times):
    """Give access, somebody with a key and the books that say nothing, for less patience."""
    stored, text = key(rpm=rpm)
    books = Books()
    books.silent = True
    async with access(stored, books=books, patience_s=0.2, **times) as made:
        yield made, await made.identify(f"Bearer {text}"), books


async def test_it_is_found_out_once_that_the_books_are_silent():
    async with silent_books(rpm=200) as (made, caller, books):

        async def waited():
            began = time.monotonic()
            await made.charge(caller, 1)
            return time.monotonic() - began

        # Those who come at first wait together, and not for one another.
        first = await asyncio.gather(*(waited() for _ in range(10)))
        assert 0.1 < max(first) < 1
        later = [await waited() for _ in range(100)]
        assert sum(waited_s > 0.1 for waited_s in later) < 3, "on a busy machine one may be late"
        books.silent = False
        # Once they speak again the limit holds again.
        with pytest.raises(errors.RateLimited):
            async with asyncio.timeout(10):
                while True:
                    await made.charge(caller, 1)
                    await asyncio.sleep(0.01)


async def test_nobody_is_refused_because_the_event_loop_stood_still():
    async with silent_books(answers_s=0.4) as (made, caller, _):
        charging = asyncio.create_task(made.charge(caller, 1))
        await asyncio.sleep(0.05)
        time.sleep(0.6)  # noqa: ASYNC251
        await charging


async def test_nobody_is_refused_because_the_answers_had_expired_when_they_came(monkeypatch):
    monkeypatch.setattr("app.tenants.access.LEASE_S", 0.2)
    monkeypatch.setattr("app.tenants.allowance.LEASE_S", 0.2)
    stored, text = key(rpm=100, tpm=1000)

    class Still(Books):
        async def answer(self, asks):
            given = await super().answer(asks)
            time.sleep(0.25)  # noqa: ASYNC251
            return given

    async with access(stored, books=Still(), answers_s=0.2) as made:
        caller = await made.identify(f"Bearer {text}")
        assert await admitted(made, caller, 5) == 5
        assert made.limits_away


async def test_many_at_once_and_a_large_one_among_them_all_get_by_where_there_is_room():
    stored, text = key(rpm=100_000, tpm=1_000_000)
    async with access(stored) as made:
        caller = await made.identify(f"Bearer {text}")
        # Nothing was given before, and others of the same key come all the while.
        for sizes in ([1000, *[30] * 40], [*[30] * 40, 50_000]):
            await asyncio.gather(*(made.charge(caller, size) for size in sizes))


async def test_nobody_is_refused_while_there_is_room_however_late_the_books_answer():
    async def served_by_two(seed):
        chance = random.Random(seed)
        first_s = iter([0.0, 0.0, 0.15, 0.15])
        stored, text = key(rpm=60)
        books = Books(late_s=lambda: next(first_s, 0.0) + chance.uniform(0.01, 0.05))
        async with (
            access(stored, books=books, ingress="one") as one,
            access(stored, books=books, ingress="other") as other,
        ):
            caller = await one.identify(f"Bearer {text}")

            async def served():
                done = await admitted(one if chance.random() < 0.8 else other, caller, 1)
                await asyncio.sleep(chance.uniform(0.01, 0.03))
                return done

            waves = [await asyncio.gather(*(served() for _ in range(10))) for _ in range(10)]
            return sum(map(sum, waves))

    assert min(await asyncio.gather(*map(served_by_two, range(60)))) >= 57


async def test_a_renewal_gives_up_nothing_that_somebody_waits_for():
    stored, text = key(rpm=10)
    books = Books(late_s=lambda: 0.15)
    async with access(stored, books=books) as made:
        caller = await made.identify(f"Bearer {text}")
        await made.charge(caller, 1)
        # The next one went out as the first answer came.
        assert books.asked <= 2


async def test_a_priority_share_holds():
    stored, text = key(priority_share=Decimal("0.25"))
    async with access(stored) as made:
        caller = await made.identify(f"Bearer {text}")

        def over(wanted):
            rights, part = made.rights(caller, wanted)
            part.decide(time.monotonic(), priority=part.allowed)
            part.end()
            return rights.over_share

        assert [over(Tier.PRIORITY) for _ in range(40)].count(False) == 10
        assert not over(Tier.DEFAULT)


async def test_a_key_has_its_own_tiers_and_nobody_has_all():
    stored, text = key(tiers=[Tier.FLEX])
    async with access(stored) as made:
        caller = await made.identify(f"Bearer {text}")
        rights, part = made.rights(caller, Tier.PRIORITY)
        assert (rights.tiers, part) == ({Tier.DEFAULT, Tier.FLEX}, None)
        assert made.rights(NOBODY, Tier.PRIORITY) == (ALL_RIGHTS, None)
        await made.charge(NOBODY, 10**9)
        assert made.headers(NOBODY) == []
