from dataclasses import replace

import pytest

from app.cli.board import Sheds, Sight, make_frame
from app.config.model import ModelSettings
from app.contracts.adapters import AdapterState, WantedAdapter
from app.contracts.credits import Demand
from app.contracts.stats import IngressBoard, ModelBoard, QueueReport
from app.contracts.status import ModelSnapshot, Preempted, ReplicaStatus, Sleep
from app.core.dialect import Dialect, Route
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier

pytestmark = pytest.mark.unit

FULL = (Tier.DEFAULT, ShedReason.QUEUE_FULL)


def tiers(priority, default, flex):
    return {Tier.PRIORITY: priority, Tier.DEFAULT: default, Tier.FLEX: flex}


def board(*ingresses):
    return ModelBoard(model(replica("a"), replica("b", native=False)), ingresses)


def model(*replicas):
    return ModelSnapshot("org/m", ("m",), "me", 0, ModelSettings(), replicas)


def replica(name, *, native=True, slots=4):
    dialect = Dialect(
        "vllm",
        False,
        dict.fromkeys(Tier, 0),
        frozenset(Route) if native else frozenset(),
        preempts=native,
    )
    preempted = Preempted(3, 1, 2.5) if native else None
    return ReplicaStatus(
        *(name, "pool", "http://secret", "secret", slots, "0.32", None, dialect),
        preempted=preempted,
    )


def ingress(
    name="one",
    *,
    at=0.0,
    held=None,
    running=(0, 0, 0),
    waiting=(0, 0, 0),
    oldest_s=(0.0, 0.0, 0.0),
    placed=(0, 0, 0),
    queued_s=(0.0, 0.0, 0.0),
    sheds=None,
):
    demand = Demand(
        name, 1, 0.0, "l", 1, held or {}, tiers(*running), tiers(*waiting), tiers(*oldest_s), 0
    )
    report = QueueReport(at, 1, tiers(0.5, 1.5, 0.0), tiers(*placed), tiers(*queued_s), sheds or {})
    return IngressBoard(demand, report)


def only_model(now, before=None):
    [frame] = make_frame(
        {"app": Sight("RUNNING", now)}, {"app": Sight("RUNNING", before)} if before else {}
    )
    return frame


def test_adapters_that_an_engine_failed_to_load_are_shown():
    states = (
        AdapterState(WantedAdapter("a", "/a"), loaded=True),
        AdapterState(WantedAdapter("b", "/b"), loaded=False, why_not="no such folder"),
        AdapterState(WantedAdapter("c", "/c"), loaded=False),
    )
    loading = replace(replica("x"), adapters=states)
    frame = only_model(ModelBoard(model(replica("y"), loading), ()))
    assert frame.unloaded == {"b": "no such folder"}


def test_a_model_is_summed_up_over_its_ingresses():
    frame = only_model(
        board(
            ingress(
                "one",
                held={"a": (2, 1), "b": (2, 2)},
                running=(1, 2, 0),
                waiting=(0, 5, 1),
                oldest_s=(0.0, 3.0, 9.0),
            ),
            ingress("two", held={"a": (2, 2)}, running=(0, 2, 0), waiting=(0, 2, 0)),
        )
    )
    assert (frame.id, frame.application, frame.state) == ("org/m", "app", "RUNNING")
    assert (frame.slots, frame.credits, frame.headroom) == (8, 6, 2)
    default = frame.tiers[Tier.DEFAULT]
    assert (default.running, default.waiting, default.oldest_s) == (4, 7, 3.0)
    assert default.grants_per_s == 3.0
    assert frame.tiers[Tier.FLEX].oldest_s == 9.0
    assert [(r.replica_id, r.running, r.slots, r.credits) for r in frame.replicas] == [
        ("a", 3, 4, 4),
        ("b", 2, 4, 2),
    ]
    assert [r.native_priority for r in frame.replicas] == [True, False]
    assert [r.preempts for r in frame.replicas] == [True, False]
    assert [r.preempted for r in frame.replicas] == [Preempted(3, 1, 2.5), None]
    assert [(i.ingress, i.running, i.waiting, i.credits) for i in frame.ingresses] == [
        ("one", 3, 6, 4),
        ("two", 2, 2, 2),
    ]


def test_rates_are_those_between_two_reports_by_the_ingress_s_own_clock():
    before = board(ingress(at=100.0, placed=(0, 4, 0), queued_s=(0, 8.0, 0), sheds={FULL: 7}))
    now = board(ingress(at=102.0, placed=(0, 8, 0), queued_s=(0, 9.0, 0), sheds={FULL: 12}))
    row = only_model(now, before).tiers[Tier.DEFAULT]
    assert row.sheds == {ShedReason.QUEUE_FULL: Sheds(total=12, per_s=2.5)}
    assert row.queued_s == 0.25
    assert only_model(now, before).tiers[Tier.FLEX].queued_s is None, "none was placed"


def test_a_reason_first_seen_now_has_a_rate_too():
    row = only_model(board(ingress(at=2.0, sheds={FULL: 3})), board(ingress(at=1.0)))
    assert row.tiers[Tier.DEFAULT].sheds[ShedReason.QUEUE_FULL] == Sheds(3, 3.0)


@pytest.mark.parametrize(
    "before",
    [
        None,
        board(ingress(at=5.0, sheds={FULL: 7})),
        board(ingress("another", at=1.0)),
        board(),
    ],
    ids=["no look before", "no new report", "another ingress", "no ingress"],
)
def test_without_two_reports_of_one_ingress_there_is_no_rate(before):
    row = only_model(board(ingress(at=5.0, sheds={FULL: 7})), before).tiers[Tier.DEFAULT]
    assert row.sheds[ShedReason.QUEUE_FULL] == Sheds(7, None)
    assert row.queued_s is None


def test_an_ingress_that_has_just_come_adds_its_sheds_to_no_rate():
    before = board(ingress("one", at=1.0, sheds={FULL: 1}))
    now = board(
        ingress("one", at=2.0, sheds={FULL: 2}), ingress("back", at=900.0, sheds={FULL: 500})
    )
    row = only_model(now, before).tiers[Tier.DEFAULT]
    assert row.sheds[ShedReason.QUEUE_FULL] == Sheds(502, 1.0)


def test_a_model_that_does_not_answer_and_one_without_ingresses_are_shown():
    look = {"z": Sight("DEPLOYING", None), "a": Sight("RUNNING", board())}
    idle, silent = make_frame(look, {})
    assert (silent.application, silent.state, silent.id) == ("z", "DEPLOYING", None)
    assert idle.credits == 0 and idle.slots == 8
    assert idle.tiers[Tier.PRIORITY].oldest_s == 0


def test_a_model_that_rests_is_shown_as_what_it_does():
    for rest, state in (
        (Sleep(()), "ASLEEP"),
        (Sleep((), waking=True), "WAKING"),
        (None, "RUNNING"),
    ):
        frame = only_model(ModelBoard(replace(model(), sleep=rest), (ingress(),)))
        assert (frame.state, frame.replicas) == (state, ())


def test_a_replica_that_the_model_does_not_know_any_more_is_draining_while_it_has_requests():
    frame = only_model(
        board(
            ingress("one", held={"a": (2, 1), "gone": (0, 2)}),
            ingress("two", held={"gone": (0, 1), "over": (1, 0)}),
        )
    )
    assert [row.replica_id for row in frame.replicas] == ["a", "b", "gone"]
    row = frame.replicas[-1]
    assert (row.draining, row.running, row.slots) == (True, 3, 0)
    assert frame.slots == 8
