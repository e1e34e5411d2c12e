import asyncio
from types import SimpleNamespace

import pytest

from app.config.model import ModelSettings
from app.contracts.credits import Demand, Grant
from app.contracts.stats import REPORT_S
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.core.dialect import Dialect, Route
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier
from app.flow.admission import Admission, Shed
from app.flow.allocation.stats import ReportStore
from app.flow.credits import QUIET_S, RENEWAL_S, SILENCE_S
from app.flow.request import QueuedRequest, RequestState
from app.flow.stats import Tally

pytestmark = pytest.mark.unit

NOTHING = dict.fromkeys(Tier, 0)


def demand(ingress="one", number=1):
    return Demand(ingress, number, 0.0, "life", 1, {}, NOTHING, NOTHING, NOTHING, 0)


def report(at=0.0):
    return Tally().report(at, headroom=0, grants_per_s=NOTHING)


def placed(tier=Tier.DEFAULT, *, arrived=0.0, at=0.0, replayed=False):
    state = RequestState.PLACED
    return QueuedRequest(tier, "", 1, state=state, arrived=arrived, placed=at, replayed=replayed)


def shed(tier, reason):
    return QueuedRequest(tier, "", 1, state=RequestState.SHED, shed=reason)


def test_a_tally_counts_by_tier_and_reason_and_never_forgets():
    tally = Tally()
    tally.count(placed(arrived=1.0, at=1.5))
    tally.count(placed(arrived=2.0, at=4.0))
    tally.count(placed(Tier.PRIORITY))
    tally.count(shed(Tier.FLEX, ShedReason.QUEUE_FULL))
    first = tally.report(5.0, headroom=2, grants_per_s=NOTHING)
    assert (first.at, first.headroom) == (5.0, 2)
    assert first.placed == {Tier.PRIORITY: 1, Tier.DEFAULT: 2, Tier.FLEX: 0}
    assert first.queued_s == {Tier.PRIORITY: 0.0, Tier.DEFAULT: 2.5, Tier.FLEX: 0.0}
    assert first.sheds == {(Tier.FLEX, ShedReason.QUEUE_FULL): 1}

    tally.count(shed(Tier.FLEX, ShedReason.QUEUE_FULL))
    tally.count(shed(Tier.DEFAULT, ShedReason.DISPLACED))
    second = tally.report(6.0, headroom=2, grants_per_s=NOTHING)
    assert second.sheds == {
        (Tier.FLEX, ShedReason.QUEUE_FULL): 2,
        (Tier.DEFAULT, ShedReason.DISPLACED): 1,
    }
    assert first.sheds == {(Tier.FLEX, ShedReason.QUEUE_FULL): 1}, "a report does not change"


def test_a_replay_has_not_queued_while_its_engine_had_it():
    tally = Tally()
    tally.count(placed(arrived=0.0, at=30.0, replayed=True))
    told = tally.report(31.0, headroom=0, grants_per_s=NOTHING)
    assert not any(told.placed.values()) and not any(told.queued_s.values())


def test_the_book_keeps_the_latest_word_of_every_ingress():
    book = ReportStore()
    first, later = report(0.0), report(1.0)
    book.take(demand("two"), first, 0.0)
    book.take(demand("one"), first, 0.0)
    book.take(demand("one", number=2), None, 0.5)
    boards = book.ingresses(0.5)
    assert [(b.demand.ingress, b.demand.number) for b in boards] == [("one", 2), ("two", 1)]
    assert boards[0].report is first

    book.take(demand("one", number=3), later, 1.0)
    assert book.ingresses(1.0)[0].report is later


def test_an_ingress_is_on_the_board_once_it_has_reported():
    book = ReportStore()
    book.take(demand(), None, 0.0)
    assert book.ingresses(0.0) == ()
    book.take(demand(number=2), report(), 0.2)
    assert len(book.ingresses(0.2)) == 1


def test_a_silent_ingress_is_dropped():
    book = ReportStore()
    book.take(demand("silent"), report(), 0.0)
    book.take(demand("heard"), report(), 0.0)
    book.take(demand("heard", number=2), None, SILENCE_S - 0.1)
    assert len(book.ingresses(SILENCE_S - 0.1)) == 2
    assert [board.demand.ingress for board in book.ingresses(SILENCE_S)] == ["heard"]


def test_ingresses_that_come_and_go_do_not_pile_up_where_nobody_looks():
    book = ReportStore()
    for generation in range(100):
        book.take(demand(f"ingress {generation}"), report(), generation * SILENCE_S)
    # At that time none of them was silent, so whoever is remembered is there.
    assert len(book.ingresses(0.0)) == 1


def admission(*, slots, **queue):
    dialect = Dialect("vllm", False, dict.fromkeys(Tier, 0), frozenset(Route))
    replica = ReplicaStatus("one", "pool", "http://one", "key", slots, "1", None, dialect)
    settings = ModelSettings.load({"queue": {"headroom": 0, **queue}}, "user_config")
    made = Admission("ingress")
    made.update(ModelSnapshot("m", (), "me", 0, settings, (replica,)))
    asked = made.demand()
    added = {"one": slots}
    made.receive(Grant("life", 1, asked.number, asked.sent_at, added=added, headroom=0))
    return made


async def test_an_admission_reports_at_most_once_a_second(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("app.flow.admission.time", SimpleNamespace(monotonic=lambda: now))
    made = admission(slots=1)
    assert made.report() is not None
    now += REPORT_S - 0.01
    made.demand()
    assert made.report() is None
    now += 0.01
    made.demand()
    again = made.report()
    assert again is not None and again.at == now


async def renews_at_once(made):
    waiting = asyncio.create_task(made.wait_for_renewal())
    await asyncio.sleep(0)
    waiting.cancel()
    return waiting.done()


async def test_what_was_counted_is_reported_as_soon_as_a_report_is_due(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("app.flow.admission.time", SimpleNamespace(monotonic=lambda: now))
    made = admission(slots=1)

    def renew():
        asked = made.demand()
        grant = Grant("life", asked.number, asked.number, asked.sent_at, headroom=0)
        made.receive(grant)
        return made.report()

    assert renew() is not None
    now += REPORT_S - 0.1
    assert renew() is None
    counted_at, now = now + 0.05, now + QUIET_S - 0.01
    assert not await renews_at_once(made)
    now += 0.01
    assert await renews_at_once(made)
    now = counted_at
    with pytest.raises(Shed):
        await made.admit(
            QueuedRequest(Tier.DEFAULT, "", 1, fail_fast=True, without=frozenset({"one"}))
        )
    now = 1000.0 + REPORT_S - 0.1 + RENEWAL_S - 0.01
    assert not await renews_at_once(made)
    now += 0.01
    assert await renews_at_once(made)
    told = renew()
    assert told is not None and told.sheds == {(Tier.DEFAULT, ShedReason.NO_OTHER_REPLICA): 1}


async def test_an_admission_counts_whoever_it_tells(monkeypatch):
    one = {"max_waiting": 1}
    made = admission(slots=1, flex=one, default=one, priority=one)
    running, waiting, gone = (QueuedRequest(Tier.DEFAULT, "", 1) for _ in range(3))
    jumping = QueuedRequest(Tier.PRIORITY, "", 1, route=Route.CHAT)
    await made.admit(running)
    with pytest.raises(Shed):
        await made.admit(QueuedRequest(Tier.FLEX, "", 1, fail_fast=True))
    displaced = asyncio.create_task(made.admit(waiting))
    await asyncio.sleep(0)
    with pytest.raises(Shed):
        await made.admit(QueuedRequest(Tier.DEFAULT, "", 1))
    jumped = asyncio.create_task(made.admit(jumping))
    with pytest.raises(Shed):
        await displaced
    made.end(running, None)
    await jumped
    # Its client leaves before it is told: nobody was placed, nobody was turned away.
    left = asyncio.create_task(made.admit(gone))
    await asyncio.sleep(0)
    left.cancel()
    made.end(jumping, None)
    await asyncio.wait([left])
    made.end(gone, None)

    told = made.report()
    assert told is not None
    assert told.placed == {Tier.PRIORITY: 1, Tier.DEFAULT: 1, Tier.FLEX: 0}
    assert told.queued_s[Tier.PRIORITY] > 0 == told.queued_s[Tier.DEFAULT]
    assert told.sheds == {
        (Tier.FLEX, ShedReason.FAIL_FAST): 1,
        (Tier.DEFAULT, ShedReason.QUEUE_FULL): 1,
        (Tier.DEFAULT, ShedReason.DISPLACED): 1,
    }
    assert told.grants_per_s[Tier.PRIORITY] > 0 == told.grants_per_s[Tier.FLEX]
