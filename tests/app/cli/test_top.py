import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from app.cli.board import IngressRow, ModelFrame, ReplicaRow, Sheds, TierRow
from app.cli.top import render, to_json
from app.contracts.slo import TierAttainment
from app.contracts.status import Preempted
from app.contracts.traffic import Attainment
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier

pytestmark = pytest.mark.unit

IDLE = TierRow(0, 0, 0.0, None, 0.0, {})
BUSY = TierRow(
    running=5,
    waiting=12,
    oldest_s=2.06,
    queued_s=0.25,
    grants_per_s=13.81,
    sheds={
        ShedReason.QUEUE_FULL: Sheds(164, 4.5),
        ShedReason.DISPLACED: Sheds(3, 0.0),
        ShedReason.FAIL_FAST: Sheds(2, None),
    },
)
REPLICA = ReplicaRow("abc", "gpu", "vllm", "0.32", True, 7, 8, 6)
MODEL = ModelFrame(
    "app",
    "RUNNING",
    id="org/model",
    tiers={Tier.PRIORITY: IDLE, Tier.DEFAULT: BUSY, Tier.FLEX: IDLE},
    slots=16,
    credits=14,
    headroom=2,
    replicas=(
        replace(REPLICA, preempts=True, preempted=Preempted(149, 2, 30.0)),
        replace(REPLICA, replica_id="def", native_priority=False),
    ),
    ingresses=(IngressRow("one", 5, 12, 14, 2),),
)


def lines(*models, trouble="", width=120):
    shown = io.StringIO()
    console = Console(file=shown, width=width)
    console.print(render("127.0.0.1:6379", models, trouble))
    return [line.split() for line in shown.getvalue().splitlines() if line.strip()]


def test_a_frame_tells_the_line_by_tier_the_credits_and_the_replicas():
    shown = lines(MODEL)
    assert " ".join(shown[0]) == "Ray cluster 127.0.0.1:6379, 1 model"
    assert " ".join(shown[1]) == "org/model 1 ingress, credits 14/16, headroom 2"
    assert shown[2] == ["tier", "running", "waiting", "oldest", "queued", "grants/s", "sheds"]
    assert shown[3] == ["priority", "0", "0", "-", "-", "0.0", "-"]
    assert " ".join(shown[4]) == (
        "default 5 12 2.1 s 250 ms 13.8 queue_full 164 (4.5/s), displaced 3, fail_fast 2"
    )
    assert " ".join(shown[7]) == "abc gpu vllm 0.32 native, preempts 7/8 6 149, 2 now"
    assert " ".join(shown[8]) == "def gpu vllm 0.32 none 7/8 6 -"


def test_a_frame_says_what_is_not_as_it_should_be():
    shown = [
        " ".join(line)
        for line in lines(
            replace(MODEL, state="DEPLOYING", replicas=(), ingresses=()),
            ModelFrame("other", "RUNNING"),
            trouble="Serve does not answer",
        )
    ]
    assert shown[1] == "Serve does not answer"
    assert shown[2].startswith("org/model DEPLOYING 0 ingresses")
    assert "no replica is ready" in shown
    assert shown[-1] == "other its Model does not answer"


def test_objectives_are_held_against_what_was_met():
    def of(met, missed, objective):
        return TierAttainment(400, objective, Attainment(met, missed), 3600.0, Attainment())

    slo = {
        Tier.PRIORITY: of(199_999, 1, 0.95),
        Tier.DEFAULT: of(98_999, 1001, 0.99),
        Tier.FLEX: of(0, 0, 0.5),
    }
    shown = [" ".join(line) for line in lines(replace(MODEL, slo=slo))]
    assert [line for line in shown if "objective" in line] == [
        f"{tier} objective: {objective} % of streams begin within 400 ms. Last hour: {met}"
        for tier, objective, met in (
            ("priority", 95, "99.99 % of 200,000, met"),
            ("default", 99, "98.99 % of 100,000, not met"),
            ("flex", 50, "no data"),
        )
    ]
    told = to_json("a:1", [replace(MODEL, slo=slo)])["models"][0]["slo"]
    assert json.loads(json.dumps(told))["flex"]["recent"] == {"met": 0, "missed": 0}


def test_downgrades_are_counted_by_reason():
    seen = replace(MODEL, downgrades={"no_such_tier": 1200, "answer_cut_off": 3})
    shown = [" ".join(line) for line in lines(seen)]
    assert "not served as requested: no_such_tier 1,200, answer_cut_off 3" in shown
    assert not any("requested" in " ".join(line) for line in lines(MODEL))


def test_many_replicas_are_summed_up():
    replicas = tuple(replace(REPLICA, replica_id=f"r{i}") for i in range(20))
    shown = [" ".join(line) for line in lines(replace(MODEL, replicas=replicas))]
    assert shown[-2].startswith("r7 ")
    assert shown[-1] == "and 12 more 84/96 72"


def test_names_are_not_taken_for_markup():
    name = "[red]x[/red]"
    replica = replace(REPLICA, pool=name, engine_version=name)
    words = [word for line in lines(replace(MODEL, id=name, replicas=(replica,))) for word in line]
    assert words.count(name) == 3


def test_json_holds_every_number():
    told = json.loads(json.dumps(to_json("a:1", [MODEL, ModelFrame("other", "DEPLOYING")])))
    assert told["address"] == "a:1"
    model, silent = told["models"]
    assert model["tiers"]["default"]["sheds"]["queue_full"] == {"total": 164, "per_s": 4.5}
    assert model["tiers"]["default"]["sheds"]["fail_fast"] == {"total": 2, "per_s": None}
    assert list(model["tiers"]) == ["priority", "default", "flex"]
    assert model["replicas"][0]["native_priority"] is True
    assert [one["preempts"] for one in model["replicas"]] == [True, False]
    counts = {"preemptions": 149, "suspended": 2, "suspended_s": 30.0}
    assert [one["preempted"] for one in model["replicas"]] == [counts, None]
    assert model["ingresses"][0]["credits"] == 14
    assert (silent["id"], silent["tiers"]) == (None, {})
