import json
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import alarms, supervision
from app.config.access_log import AccessLogSettings
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.ledger.record import State, UsageRecord
from app.observe import access_log, backlog
from app.observe.access_log import AccessLog, line
from app.observe.observers import Context, Ended, Refused
from tests.support.records import NOON, completed, new_id, opened, records, shed
from tests.support.waiting import until

pytestmark = pytest.mark.unit

REFUSED = Refused(
    "req_0001", "embeddings", "acme", 404, "model_not_found", "k1", 0.5, Context(b"from-client")
)


@pytest.fixture
def log(tmp_path):
    made = AccessLog(lambda: tmp_path / "access.log")
    yield made
    made.close()


def use(log, **settings):
    with log.change(AccessLogSettings.load(settings, "access_log")) as old:
        pass
    if old is not None:
        old.close()


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_line_has_the_ids_tiers_times_tokens_and_cost_of_its_request():
    usage = TokenUsage(1000, 400, 250, cache_write_tokens=100, images=2, audio_seconds=3)
    record = replace(completed(usage=usage, served=Tier.DEFAULT), preemptions=2)
    written = line(Ended(record, 200, Context(b"from-client")), NOON)
    # As a float, the cost would not be exact.
    told = json.loads(written, parse_float=Decimal)
    assert told == {
        "time": "2026-11-22T12:00:00+00:00",
        "request_id": record.origin.request_id,
        "client_request_id": "from-client",
        "trace_id": None,
        "tenant": "acme",
        "key_id": "k1",
        "model": "m",
        "route": "chat/completions",
        "stream": True,
        "requested_tier": "priority",
        "served_tier": "default",
        "state": "completed",
        "reason": "no_replica_honours_priority",
        "status": 200,
        "engine": "vllm",
        "replica": "r1",
        "arrived": "2026-11-22T12:00:00+00:00",
        "queue_s": Decimal("0.25"),
        "ttft_s": Decimal("0.5"),
        "duration_s": Decimal("2.0"),
        "prompt_tokens": 1000,
        "cached_tokens": 400,
        "completion_tokens": 250,
        "cache_write_tokens": 100,
        "images": 2,
        "audio_seconds": 3,
        "usage_estimated": False,
        "preemptions": 2,
        "cost": record.cost,
    }


@given(records())
def test_every_record_has_one_line_with_the_same_names(record):
    ended, refused = line(Ended(record, 200), NOON), line(REFUSED, NOON)
    assert b"\n" not in ended + refused
    assert json.loads(ended).keys() == json.loads(refused).keys()
    fields, told = record.to_fields(), json.loads(ended, parse_float=Decimal)
    assert Decimal(told["cost"]) == record.cost
    for name in ("request_id", "tenant", "model", "served_tier", "state", "reason"):
        assert told[name] == fields[name]


@given(st.binary(max_size=300))
def test_the_clients_own_id_is_logged_only_if_it_is_short_and_printable(given_id):
    refused = Refused("req_1", "embeddings", "", 401, "no_key", context=Context(given_id))
    told = json.loads(line(refused, NOON))
    sane = 0 < len(given_id) <= 128 and all(33 <= byte <= 126 for byte in given_id)
    assert told["client_request_id"] == (given_id.decode() if sane else None)


def test_lines_are_written_in_order_and_the_rest_at_the_end(log, tmp_path):
    use(log)
    ids = [new_id() for _ in range(300)]
    for request_id in ids:
        log.ended(Ended(completed(request_id), 200))
    log.refused(REFUSED)
    log.close()
    written = lines(tmp_path / "access.log")
    assert [one["request_id"] for one in written] == [*ids, "req_0001"]
    assert (written[-1]["status"], written[-1]["model"]) == (404, None)
    assert written[-1]["duration_s"] == 0.5


def test_a_sample_is_logged_and_problems_always(log, tmp_path):
    use(log, sample=0.25)
    good = [f"req_{number:04x}" for number in range(0, 0x10000, 0x100)]
    for request_id in good:
        log.ended(Ended(completed(request_id), 200))
    problems = [
        completed(new_id(), served=Tier.DEFAULT),
        shed(),
        opened().settle(State.INTERRUPTED, completed().usage, ended=NOON, reason="client_gone"),
        UsageRecord.not_served(
            completed().origin, State.ABANDONED, "client_gone", queue_s=1, ended=NOON
        ),
    ]
    for record in problems:
        log.ended(Ended(record, 200))
    use(log, sample=0.0, problems_always=False)
    for record in problems:
        log.ended(Ended(record, 200))
    log.refused(REFUSED)
    log.close()
    written = [one["request_id"] for one in lines(tmp_path / "access.log")]
    assert written == good[:64] + [record.origin.request_id for record in problems]


def test_off_writes_nothing(log, tmp_path):
    use(log, enabled=False)
    log.ended(Ended(completed(), 200))
    log.refused(REFUSED)
    assert not list(tmp_path.iterdir())


def test_files_rotate_and_are_bounded(log, tmp_path, monkeypatch):
    monkeypatch.setattr(AccessLogSettings, "max_bytes", 40_000)
    use(log, files=3)
    for _ in range(1000):
        log.ended(Ended(completed(), 200))
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["access.log", "access.log.1", "access.log.2"]
    assert all(path.stat().st_size < 40_000 for path in tmp_path.iterdir())


async def test_a_file_that_was_moved_is_opened_anew(log, tmp_path):
    use(log)
    path = tmp_path / "access.log"
    log.refused(REFUSED)
    await until(lambda: path.stat().st_size)
    path.rename(tmp_path / "old")
    log.refused(REFUSED)
    log.close()
    assert len(lines(path)) == len(lines(tmp_path / "old")) == 1


def test_more_lines_than_fit_are_dropped_and_alarmed(log, tmp_path, monkeypatch):
    monkeypatch.setattr(access_log, "MOST_WAITING", 10)
    monkeypatch.setattr(backlog, "EVERY_S", 60)
    use(log)
    before = alarms.PROCESS.counts().get("access log full", 0)
    for _ in range(25):
        log.refused(REFUSED)
    log.close()
    assert len(lines(tmp_path / "access.log")) == 10
    assert alarms.PROCESS.counts()["access log full"] == before + 15


async def test_a_disk_that_fails_is_alarmed_and_lines_go_on_afterwards(log, tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    use(log)
    path = tmp_path / "access.log"
    path.unlink()
    path.mkdir()
    before = alarms.PROCESS.counts().get("access log lost", 0)
    log.refused(REFUSED)
    await until(lambda: alarms.PROCESS.counts().get("access log lost", 0) == before + 1)
    # The thread raises the alarm first; its supervision counts the failure a moment later.
    await until(lambda: "access log" in supervision.PROCESS.failures())
    path.rmdir()
    log.refused(REFUSED)
    await until(lambda: path.is_file() and path.stat().st_size)
    assert len(lines(path)) == 1
