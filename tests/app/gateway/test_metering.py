import asyncio

import pytest

from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect
from app.core.pricing import RateCard, TokenUsage
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier, TierReason
from app.gateway.metering import Meter
from app.gateway.response import Placement
from app.ledger.ledger import DiskRefuses, Opening
from app.ledger.record import Origin, State, now_utc
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
    one.write_off("ledger_unavailable")
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
    one.turn_away(State.SHED, "queue_full")
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
