from decimal import Decimal

import orjson
import pytest

from app.config.model import ModelSettings
from app.contracts.credits import Demand
from app.contracts.news import PoolChange, ScalingDecision
from app.contracts.speeds import Speeds
from app.contracts.stats import IngressBoard, ModelBoard, Suspended
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.contracts.traffic import Outcome, Served, Traffic
from app.core.dialect import Dialect, Route
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.flow.stats import Tally
from app.history.point import MOST_REPLICAS, OTHERS, replica_points
from app.history.recorder import MOST_DECISIONS, Recorder

pytestmark = pytest.mark.unit

NOTHING = dict.fromkeys(Tier, 0)
SECRETS = ("s3cret-key", "10.0.0.7")


def replica(name="one", slots=4, preempts=True):
    dialect = Dialect("vllm", False, dict.fromkeys(Tier, 0), frozenset(Route), preempts=preempts)
    return ReplicaStatus(name, "pool", f"http://{SECRETS[1]}", SECRETS[0], slots, "1", 9, dialect)


def ingress(name="in", held=None, waiting=0, oldest=0.0):
    demand = Demand(
        name, 1, 0.0, "life", 1, held or {}, NOTHING, {**NOTHING, Tier.FLEX: waiting},
        {**NOTHING, Tier.FLEX: oldest}, 0,
    )  # fmt: skip
    return IngressBoard(demand, Tally().report(0.0, headroom=0, grants_per_s=NOTHING))


def board(ingresses=(), replicas=(), settings=None):
    settings = ModelSettings.load(settings or {}, "user_config")
    return ModelBoard(ModelSnapshot("m", (), "me", 0, settings, tuple(replicas)), tuple(ingresses))


def traffic(*, served=0, shed=0, downgraded=0):
    counts = Traffic()
    done = Served(True, 0.0, 0.3, 2.0, TokenUsage(10, 0, 60), Decimal("0.01"), False)
    for _ in range(served):
        counts.add(Outcome(Tier.FLEX, Tier.FLEX, "completed", None), done)
    for _ in range(downgraded):
        reason = "no_replica_honours_priority"
        counts.add(Outcome(Tier.PRIORITY, Tier.DEFAULT, "completed", reason), done)
    for _ in range(shed):
        counts.add(Outcome(Tier.FLEX, None, "shed", "queue_full"), None)
    return counts


def report(counts):
    made = Tally().report(0.0, headroom=0, grants_per_s=NOTHING)
    return type(made)(**{**{f: getattr(made, f) for f in made.__slots__}, "traffic": counts})


def test_points_show_queue_engines_and_what_was_new():
    recorder = Recorder("life", 0.0, 1000.0)
    recorder.take("in", report(Traffic()), 0.0)
    recorder.record(board(), {}, 0.0, 1000.0)
    recorder.take("in", report(traffic(served=30, shed=2, downgraded=1)), 9.0)
    now = board([ingress(held={"one": (4, 6)}, waiting=7, oldest=1.5)], [replica()])
    recorder.record(now, {Tier.FLEX: Suspended(2, 3.0)}, 10.0, 1010.0)
    recorder.record(now, {}, 11.0, 1011.0)
    assert recorder.downgrades() == {"no_replica_honours_priority": 1}
    news = recorder.news("", 0)
    _, second, third = (orjson.loads(row) for row in news.fine)
    at, (_, default, flex), sheds, downgrades, replicas = second
    assert at == 1010.0
    assert flex[:4] == [7, 1.5, 0, 2]
    assert 0.25 < flex[4] <= flex[5] <= 0.5
    assert flex[6:] == [pytest.approx(1.8), pytest.approx(180.0), pytest.approx(3.0)]
    assert default[8] == pytest.approx(0.1)
    assert (sheds, downgrades) == ({"queue_full": 2}, {"no_replica_honours_priority": 1})
    assert replicas == {"one": [4, 2, 4]}
    assert third[2:4] == [{}, {}], "it was counted before"


def test_attainment_and_speeds_are_of_all_ingresses():
    recorder = Recorder("life", 0.0, 0.0)
    settings = {"slo": {"flex": {"ttft_ms": 400, "p": 0.75}, "priority": {"ttft_ms": 100}}}
    recorder.record(board(settings=settings), {}, 0.0, 0.0)
    for name in ("one", "two"):
        counts = traffic(served=4)
        counts.attain(Tier.FLEX, met=True)
        counts.attain(Tier.FLEX, met=name == "one")
        counts.attain(Tier.DEFAULT, met=False)
        recorder.take(name, report(counts), 20.0)
    recorder.record(board(settings=settings), {}, 20.0, 20.0)
    recorder.record(board(settings=settings), {}, 21.0, 21.0)
    state = orjson.loads(recorder.news("", 0).state)
    assert state["slo"] == {
        "priority": {"ttft_ms": 100, "objective": 0.99, "recent": [0, 0], "recent_s": 21,
                     "kept": None, "total": [0, 0]},
        "flex": {"ttft_ms": 400, "objective": 0.75, "recent": [3, 1], "recent_s": 21,
                 "kept": True, "total": [3, 1]},
    }  # fmt: skip
    assert recorder.slo(ModelSettings().slo) == {}
    assert recorder.downgrades() == {}
    flex = Speeds.from_fields(state["speeds"]).tiers[Tier.FLEX]
    assert (flex.requests, flex.ttft_p50_s) == (8, pytest.approx(0.375, abs=0.126))


def test_attainment_reaches_back_an_hour_and_speeds_five_minutes():
    recorder, counts = Recorder("life", 0.0, 0.0), Traffic()
    settings = {"slo": {"flex": {"ttft_ms": 400}}}
    seen = {}
    for minute in range(80):
        now = 60.0 * minute + 20
        if minute == 1:
            counts = traffic(served=1)
            counts.attain(Tier.FLEX, met=False)
        recorder.take("in", report(counts), now)
        recorder.record(board(settings=settings), {}, now, now)
        state = orjson.loads(recorder.news("life", 10**6).state)
        requests = Speeds.from_fields(state["speeds"]).tiers[Tier.FLEX].requests
        seen[minute] = (state["slo"]["flex"]["recent"][1], requests)
    assert [seen[minute] for minute in (1, 5, 7, 59, 62, 79)] == [
        (1, 1), (1, 1), (1, 0), (1, 0), (0, 0), (0, 0),
    ]  # fmt: skip


def test_a_report_of_an_older_version_is_no_fault():
    old = Tally().report(0.0, headroom=0, grants_per_s=NOTHING)
    # As it is unpickled where a field has been added since.
    object.__delattr__(old, "traffic")
    recorder = Recorder("life", 0.0, 0.0)
    recorder.take("in", old, 0.0)
    recorder.take("in", None, 0.0)
    recorder.record(board(), {}, 0.0, 0.0)
    assert len(recorder.news("", 0).fine) == 1


def test_rates_are_of_the_window_alone():
    recorder = Recorder("life", 0.0, 0.0)
    for second in range(120):
        recorder.take("in", report(traffic(served=min(second, 60))), float(second))
        recorder.record(board(), {}, float(second), float(second))
    rates = [orjson.loads(row)[1][Tier.FLEX.rank][8] for row in recorder.news("", 0).fine]
    assert rates[50] == pytest.approx(1.0)
    assert rates[119] == 0.0


def test_what_was_served_before_it_started_is_in_the_totals_and_in_no_rate():
    recorder = Recorder("life", 0.0, 0.0)
    recorder.record(board(), {}, 0.0, 0.0)
    recorder.take("in", report(traffic(served=100, shed=5)), 1.0)
    recorder.record(board(), {}, 1.0, 1.0)
    news = recorder.news("", 0)
    last, state = orjson.loads(news.fine[-1]), orjson.loads(news.state)
    assert last[1][Tier.FLEX.rank][8] == 0 and last[2] == {}
    assert state["totals"]["flex"]["requests"] == 100
    assert state["totals"]["flex"]["cost"] == "1.00"
    assert state["sheds"] == {"queue_full": 5}


def test_news_are_what_is_new_and_everything_of_another_life():
    recorder = Recorder("life", 0.0, 0.0)
    for second in range(5):
        recorder.record(board(), {}, float(second), float(second))
    assert len(recorder.news("life", 3).fine) == 2
    assert len(recorder.news("other", 3).fine) == 5
    assert len(recorder.news("life", 99).fine) == 0


def test_decisions_are_kept_once_and_bounded():
    recorder = Recorder("life", 0.0, 0.0)
    made = [
        ScalingDecision(float(at), "why", {"pool": PoolChange(1, 2, "priority")})
        for at in range(MOST_DECISIONS + 5)
    ]
    for end in (3, 10, len(made)):
        recorder.decided(made[:end])
    recorder.record(board(), {}, 0.0, 0.0)
    decisions = orjson.loads(recorder.news("", 0).state)["decisions"]
    assert [one["at"] for one in decisions] == [float(n) for n in range(5, len(made))]
    assert decisions[0]["pools"] == {"pool": [1, 2, "priority"]}


def test_no_key_and_no_address_is_shown():
    recorder = Recorder("life", 0.0, 0.0)
    recorder.record(board([ingress()], [replica()]), {}, 0.0, 0.0)
    news = recorder.news("", 0)
    shown = b"".join((news.state, *news.fine)).decode()
    assert not [secret for secret in SECRETS if secret in shown]


def test_an_engine_that_does_not_preempt_suspends_nobody():
    held = [ingress(held={"one": (4, 6)})]
    assert replica_points([replica(preempts=False)], held)["one"].suspended == 0
    assert replica_points([replica()], held)["one"].suspended == 2


def test_replicas_are_bounded_and_none_is_left_out_of_the_sum():
    names = [f"{number:03}" for number in range(MOST_REPLICAS + 10)]
    points = replica_points(map(replica, names), [ingress(held={name: (4, 3) for name in names})])
    assert len(points) == MOST_REPLICAS + 1
    assert points[OTHERS].running == 30
    assert sum(one.slots for one in points.values()) == 4 * len(names)


def test_a_draining_replica_has_no_slots():
    assert replica_points([], [ingress(held={"old": (0, 2)})])["old"].slots == 0
