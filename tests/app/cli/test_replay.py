"""`frontline plan --replay`: what the policy would have done with recorded requests."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli.main import main
from app.cli.plan import make_plan
from app.cli.replay import BadRecords, read_records, replay, to_text
from app.core.pricing import RateCard, TokenUsage
from app.core.tiers import Tier
from app.ledger.record import Origin, State, UsageRecord
from app.ledger.usage import record_fields

pytestmark = pytest.mark.unit

CONFIG = Path(__file__).parents[3] / "configs" / "autoscaling.yaml"
[MODEL] = make_plan(CONFIG.read_text())
BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def record(number, at, *, queue_s=0.0, took_s=10.0, tier=Tier.DEFAULT, model=MODEL.id):
    origin = Origin(f"r-{number}", "", "", model, "chat/completions", False, tier,
                    BEGAN + timedelta(seconds=at))  # fmt: skip
    card = RateCard(input=Decimal(1), cached_input=Decimal(1), output=Decimal(1))
    return UsageRecord(
        origin, State.COMPLETED, tier, None, "vllm", "r", TokenUsage(1, 0, 1), card.at(tier),
        card.version, queue_s, None, BEGAN + timedelta(seconds=at + queue_s + took_s),
    )  # fmt: skip


def lines(records):
    return [json.dumps(record_fields(one)).encode() for one in records]


def steady(rate, seconds, **fields):
    return [record(n, n / rate, **fields) for n in range(int(rate * seconds))]


def played(requests):
    made = replay(MODEL, requests, 30.0)
    assert made is not None
    return made


def test_more_recorded_load_asks_for_more_replicas_and_says_why():
    [pool] = MODEL.pools
    few = played(read_records(lines(steady(0.1, 900))))
    many = played(read_records(lines(steady(3.0, 900))))
    assert few.requests == 90 and many.requests == 2700
    assert many.most[pool.name] > few.most[pool.name]
    assert many.replica_hours[pool.name] > 2 * few.replica_hours[pool.name]
    assert "default needs" in many.changes[0].why
    assert few.short_s == 30, "while the first replica starts"
    assert many.short_s > 30


def test_other_models_are_left_out():
    assert replay(MODEL, read_records(lines([record(1, 0, model="other")])), 30.0) is None


def test_it_says_what_was_counted_for_slots_that_fit():
    pool = replace(MODEL.pools[0], slots=256, slots_auto=True)
    made = replay(replace(MODEL, pools=(pool,)), read_records(lines(steady(1.0, 60))), 30.0)
    assert made is not None and dict(made.assumed) == {pool.name: 256}
    assert f"{pool.name} has slots: auto: 256 counted for each replica" in to_text([made])


def test_a_shed_request_waits_and_never_runs():
    origin = record(1, 0).origin
    shed = UsageRecord.not_served(
        origin, State.SHED, "queue_full", queue_s=5.0, ended=BEGAN + timedelta(seconds=5)
    )
    [request] = read_records(lines([shed]))
    assert request.started is None
    assert played([request]).short_s == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"model,tier", "line 1 is not JSON"),
        (b"{}", "line 1 has no field 'ended'"),
        (b'{"ended": 5, "arrived": 4, "served_tier": null, "requested_tier": null, "model": ""}',
         "line 1 is not a usage record"),
        (b"[]", "line 1 is not a usage record"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_with_its_line(line, words):
    with pytest.raises(BadRecords, match=words):
        read_records([line])


def test_the_command_prints_it_as_text_and_as_json(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\n".join(lines(steady(2.0, 300))))

    def run(*options):
        return CliRunner().invoke(main, ["plan", str(CONFIG), "--replay", str(path), *options])

    shown = run("--start-s", "30")
    assert shown.exit_code == 0, shown.output
    assert "600 requests" in shown.output and "replica-hours" in shown.output
    [one] = json.loads(run("--json").output)
    assert one["requests"] == 600
    path.write_text("nonsense")
    shown = run()
    assert shown.exit_code == 1 and "line 1 is not JSON" in shown.output
