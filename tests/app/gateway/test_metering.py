import asyncio
from types import SimpleNamespace

import pytest

from app import alarms
from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect
from app.core.pricing import RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier, TierReason
from app.gateway import metering
from app.gateway.metering import Meter
from app.gateway.response import Placement
from app.ledger.ledger import DiskRefuses, Opening
from app.ledger.record import Origin, State, now_utc
from app.observe.observers import Observers
from app.protocol.usage import Counted

pytestmark = pytest.mark.unit

CARD = RateCard.load({"input": 1, "output": 2}, "rate_card")
ORIGIN = Origin("req_1", "", "", "m", "chat/completions", True, Tier.PRIORITY, now_utc())
REPLICA = ReplicaStatus("r1", "pool", "http://x", "key", 1, "1", None, Dialect("vllm"))


class FakeLedger:
    """Keeps what it is given, in order."""

    def __init__(self):
        self.calls = []
        self.refuses = False
        self.due = 0.0

    def open(self, record):
        self.calls.append(("open", record))
        kept = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(kept.set_result, not self.refuses)
        return Opening(kept)

    def write_off(self, record):
        self.calls.append(("write_off", record))

    async def settle(self, record):
        self.calls.append(("settle", record))
        await asyncio.sleep(0)

    def progress(self, request_id, usage, estimated):
        self.calls.append(("progress", usage))
        return self.due

    def count(self, record):
        self.calls.append(("count", record))


class Stream:
    """Tells its usage, and counts how often it was asked."""

    def __init__(self, usage):
        self.usage, self.asked = usage, 0

    def counted(self):
        self.asked += 1
        return Counted(self.usage)


def place(served=Tier.PRIORITY, reason=None):
    return Placement(REPLICA, TierDecision(Tier.PRIORITY, served, reason, CARD), 0.5)


def meter():
    ledger = FakeLedger()
    return Meter(lambda: ledger, ORIGIN), ledger.calls


async def test_a_stream_is_open_before_its_first_byte_and_settled_once():
    one, calls = meter()
    one.place(place())
    stream = Stream(TokenUsage(3, 0, 1))
    await one.opened(stream)
    one.progress(1)
    stream.usage = TokenUsage(3, 0, 2)
    await one.settle(State.COMPLETED)
    await one.settle(State.INTERRUPTED, "client_gone")
    assert [name for name, _ in calls] == ["open", "progress", "settle"]
    record = calls[-1][1]
    assert (record.state, record.reason) == (State.COMPLETED, None)
    assert record.usage == TokenUsage(3, 0, 2)
    assert record.cost == CARD.at(Tier.PRIORITY).cost(record.usage)
    assert record.ttft_s is not None and record.queue_s == 0.5


async def test_a_stream_can_be_opened_before_its_engine_has_begun():
    one, calls = meter()
    one.place(place())
    one.open()
    assert [name for name, _ in calls] == ["open"]
    await one.opened(Stream(TokenUsage(3, 0, 1)))
    assert [name for name, _ in calls] == ["open"]


async def test_a_stream_that_is_moved_is_opened_again_at_its_new_place():
    one, calls = meter()
    one.place(place())
    one.open()
    one.place(place(Tier.DEFAULT, TierReason.NO_REPLICA_HONOURS_PRIORITY))
    one.open()
    await one.opened(Stream(TokenUsage(3, 0, 1)))
    assert [record.served for _, record in calls] == [Tier.PRIORITY, Tier.DEFAULT]


async def test_a_stream_whose_record_is_refused_costs_nothing_whatever_its_engine_says():
    ledger = FakeLedger()
    ledger.refuses = True
    one = Meter(lambda: ledger, ORIGIN)
    one.place(place())
    one.open()
    with pytest.raises(DiskRefuses):
        await one.opened(Stream(TokenUsage(3, 0, 1)))
    assert one.usage is None
    one.write_off("ledger_unavailable", 503)
    await one.settle(State.FAILED, "another")
    assert [name for name, _ in ledger.calls] == ["open", "write_off"]
    record = ledger.calls[-1][1]
    assert (record.state, record.reason, record.cost) == (State.FAILED, "ledger_unavailable", 0)
    assert (record.usage, record.ttft_s) == (TokenUsage(0, 0, 0), None)


async def test_the_record_is_that_of_the_last_place():
    one, calls = meter()
    one.place(place())
    one.place(place(Tier.DEFAULT, TierReason.NO_REPLICA_HONOURS_PRIORITY))
    one.counted = Counted(TokenUsage(4, 0, 4))
    await one.settle(State.COMPLETED)
    [(_, record)] = calls
    assert (record.served, record.reason) == (Tier.DEFAULT, "no_replica_honours_priority")
    assert record.cost == CARD.at(Tier.DEFAULT).cost(record.usage)


async def test_a_request_that_was_not_placed_has_nothing_to_settle():
    one, calls = meter()
    await one.settle(State.INTERRUPTED, "client_gone")
    assert calls == []
    one.turn_away(State.SHED, "queue_full", 429)
    [(name, record)] = calls
    assert (name, record.state, record.reason) == ("count", State.SHED, "queue_full")
    assert (record.served, record.cost) == (None, 0)


async def test_the_record_is_written_even_where_its_client_has_gone():
    one, calls = meter()
    one.place(place())
    settling = asyncio.create_task(one.settle(State.INTERRUPTED, "client_gone"))
    await asyncio.sleep(0)
    settling.cancel()
    await asyncio.wait([settling])
    assert [name for name, _ in calls] == ["settle"]


async def test_a_unary_answer_has_no_progress():
    one, calls = meter()
    one.place(place())
    one.counted = Counted(TokenUsage(1, 0, 1))
    assert calls == []


async def test_a_streams_usage_is_read_now_and_then():
    one, calls = meter()
    one.place(place())
    stream = Stream(TokenUsage(3, 0, 1))
    await one.opened(stream)
    for _ in range(640):
        one.progress(1)
    assert 1 <= stream.asked <= 30, "each of them is parsed from the engine's bytes"
    assert len(calls) == 1 + stream.asked


async def test_a_streams_usage_is_read_when_the_ledger_is_to_write_it(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metering, "time", SimpleNamespace(monotonic=lambda: clock.now))
    ledger = FakeLedger()
    one = Meter(lambda: ledger, ORIGIN)
    one.place(place())
    stream = Stream(TokenUsage(3, 0, 1))
    await one.opened(stream)
    ledger.due = 100.1
    one.progress(1)
    for clock.now in (100.02, 100.09, 100.11):
        one.progress(1)
    assert stream.asked == 2, "at first, and once it was due"
    for clock.now in (100.2, 100.3, 100.37):
        one.progress(1)
    assert stream.asked == 3, "what is overdue is not looked at for each event"


@pytest.mark.parametrize("end", ["settle", "write_off", "turn_away"])
async def test_observers_are_told_once_of_each_end(end):
    ledger, seen = FakeLedger(), []

    class Seen:
        def ended(self, request):
            seen.append((request.record.state, request.status))

    one = Meter(lambda: ledger, ORIGIN, Observers(Seen()))
    if end == "turn_away":
        one.turn_away(State.SHED, "queue_full", 429)
        assert seen == [(State.SHED, 429)]
        return
    one.place(place())
    if end == "settle":
        await one.settle(State.COMPLETED)
        await one.settle(State.INTERRUPTED, "client_gone", status=499)
        assert seen == [(State.COMPLETED, 200)]
    else:
        one.write_off("ledger_unavailable", 503)
        await one.settle(State.FAILED, "internal_error", status=500)
        assert seen == [(State.FAILED, 503)]


async def test_a_request_that_is_abandoned_is_told_once_and_not_recorded():
    ledger, seen = FakeLedger(), []

    class Seen:
        def ended(self, request):
            seen.append((request.record.state, request.record.reason, request.status))

    one = Meter(lambda: ledger, ORIGIN, Observers(Seen()))
    one.abandon("client_gone", 499)
    one.abandon("internal_error", 500)
    assert seen == [(State.ABANDONED, "client_gone", 499)]
    assert ledger.calls == []
    other = Meter(lambda: ledger, ORIGIN, Observers(Seen()))
    other.turn_away(State.SHED, "queue_full", 429)
    other.abandon("engine_overloaded", 429)
    assert len(seen) == 2


def test_a_bill_that_differs_from_the_echo_raises_an_alarm(monkeypatch):
    raised = alarms.Alarms()
    monkeypatch.setattr("app.alarms.PROCESS", raised)
    one, _ = meter()
    one.check_echo(None)
    one.place(place())
    one.check_echo(Tier.PRIORITY)
    assert raised.counts() == {}
    one.check_echo(Tier.DEFAULT)
    assert raised.counts() == {"billed otherwise than echoed": 1}
