"""What Serve's word on a deployment without replicas means."""

from types import SimpleNamespace

import pytest
from ray.serve._private.common import (
    DeploymentStatus,
    DeploymentStatusInfo,
    DeploymentStatusInternalTrigger,
    DeploymentStatusTrigger,
)

from app.contracts.start import StartFailure, StartProblem
from deployments.control import pool_state
from deployments.control.pool_state import PoolPhase, Standing, Wakings, read_standing

pytestmark = pytest.mark.unit

STARTED = DeploymentStatusTrigger.CONFIG_UPDATE_STARTED
EVENTS = DeploymentStatusInternalTrigger
FAILURE = StartFailure("vllm", StartProblem.NO_GPU, "no driver", "look", "/l", "n", ("x",))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], PoolPhase.AWAY),  # it is being deployed
        ([EVENTS.HEALTHY], PoolPhase.ASLEEP),
        ([EVENTS.HEALTHY, EVENTS.AUTOSCALE_DOWN], PoolPhase.ASLEEP),
        ([EVENTS.HEALTHY, EVENTS.AUTOSCALE_UP], PoolPhase.WAKING),
        ([EVENTS.HEALTHY, EVENTS.HEALTH_CHECK_FAILED], PoolPhase.AWAY),
        ([EVENTS.HEALTHY, EVENTS.AUTOSCALE_UP, EVENTS.REPLICA_STARTUP_FAILED], PoolPhase.AWAY),
        ([EVENTS.HEALTHY, EVENTS.CONFIG_UPDATE], PoolPhase.AWAY),
    ],
)
def test_what_has_happened_tells_why_nobody_is_there(events, expected):
    """Serve's own state machine makes the status."""
    told = DeploymentStatusInfo("vllm", DeploymentStatus.UPDATING, STARTED)
    for event in events:
        told = told.handle_transition(trigger=event)
    assert read_standing(told) is expected


@pytest.mark.parametrize("before", PoolPhase)
@pytest.mark.parametrize("wanted", [0, 1])
async def test_serve_hears_of_replicas_before_others_do(monkeypatch, wanted, before):
    """Healthy, and none known: it sleeps if there are to be none, or is as it was for a moment."""
    told = DeploymentStatusInfo("vllm", DeploymentStatus.UPDATING, STARTED)
    told = told.handle_transition(trigger=EVENTS.HEALTHY)
    controller = SimpleNamespace(
        get_deployment_status=_answers(told.to_proto().SerializeToString()),
        get_deployment_details=_answers(SimpleNamespace(target_num_replicas=wanted)),
    )
    monkeypatch.setattr(pool_state, "serve_controller", lambda: controller)
    expected = before if wanted else PoolPhase.ASLEEP
    assert (await pool_state.standing("application", "vllm", before)).phase is expected


@pytest.mark.parametrize("failure", [None, FAILURE])
async def test_a_failed_start_is_read_from_serves_message(monkeypatch, failure):
    """d26830b: AWAY, as while it is being deployed."""
    told = DeploymentStatusInfo("vllm", DeploymentStatus.UPDATING, STARTED)
    if failure is not None:
        text = f"A replica failed to start with exception. Error:\n{failure.to_text()}"
        told = told.update_message(text)
    controller = SimpleNamespace(
        get_deployment_status=_answers(told.to_proto().SerializeToString())
    )
    monkeypatch.setattr(pool_state, "serve_controller", lambda: controller)
    found = await pool_state.standing("application", "vllm", PoolPhase.WAKING)
    assert found == Standing(PoolPhase.AWAY, failure, told=failure is not None)


def _answers(answer):
    async def remote(*names):
        assert set(names) == {"application", "vllm"}
        return answer

    return SimpleNamespace(remote=remote)


def test_how_long_it_took_to_wake_counts_from_when_serve_was_told():
    wakings = Wakings()
    course = [
        (0.0, None),
        (10.0, PoolPhase.ASLEEP),
        (20.0, PoolPhase.WAKING),
        (30.0, PoolPhase.AWAY),
        (40.0, PoolPhase.WAKING),
        (320.0, None),
        (330.0, None),
    ]
    for now, standing in course:
        wakings.note("vllm", standing, now)
        assert wakings.took_s("vllm") == (300.0 if now >= 320.0 else 0.0)
    assert wakings.took_s("sglang") == 0.0
    # Put to sleep again before it was ready: that is no start.
    for now, standing in (
        (400.0, PoolPhase.WAKING),
        (410.0, PoolPhase.ASLEEP),
        (420.0, PoolPhase.WAKING),
        (425.0, None),
    ):
        wakings.note("vllm", standing, now)
    assert wakings.took_s("vllm") == 5.0
