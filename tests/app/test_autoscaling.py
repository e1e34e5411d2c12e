"""The policy as Serve makes and calls it."""

import logging
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.config import AutoscalingPolicy

from app.autoscaling import POLICY_PATH
from app.core.tiers import Tier
from app.scaling.report import PoolReport, ScalingReport, TierReport
from app.scaling.scaler import Scaler

pytestmark = pytest.mark.unit

MODEL, POOL = DeploymentID("Model", "app"), DeploymentID("vllm", "app")


@pytest.fixture
def policy():
    """As Serve's controller has it: pickled by value where it is configured, and made there."""
    made = AutoscalingPolicy(policy_function=POLICY_PATH)
    return made.get_policy()(**made.policy_kwargs)


def context(deployment, target=1, metrics=None):
    return SimpleNamespace(
        app_name="app",
        deployment_name=deployment.name,
        target_num_replicas=target,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        raw_metrics=metrics or {},
    )


def told(at, replica="replica", *, start_s=0.0, **tiers):
    tiers = {tier: tiers.get(tier.value, TierReport()) for tier in Tier}
    report = ScalingReport(tiers, {"vllm": PoolReport(8, start_s=start_s)})
    return {
        name: {replica: [TimeStampedValue(at - 1, -1.0), TimeStampedValue(at, value)]}
        for name, value in report.to_metrics().items()
    }


def targets(policy, metrics, target=1):
    replicas, state = policy({MODEL: context(MODEL, 1, metrics), POOL: context(POOL, target)})
    assert state == {} and replicas[MODEL] == 1
    return replicas[POOL]


def test_priority_that_waits_gets_replicas_at_once(policy, caplog):
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        waits = TierReport(waiting=20, running=8)
        assert targets(policy, told(1.0, priority=waits)) == 6
        assert targets(policy, told(2.0, priority=waits), 6) == 6
    lines = [record.getMessage() for record in caplog.records if record.name == "ray.serve"]
    assert lines == [
        "app is scaled: vllm 1 -> 6: priority needs 42 slots (28.0 busy, 8 running, 20 waiting "
        "up to 0 s)"
    ]


def test_the_log_tells_how_long_a_start_takes(policy, caplog):
    waits = TierReport(waiting=20, running=8)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        targets(policy, told(1.0, start_s=95.2, priority=waits))
    assert caplog.messages[-1].endswith("waiting up to 0 s); a start takes 95 s")


def test_nothing_changes_without_news(policy):
    assert targets(policy, {}, 3) == 3
    assert targets(policy, told(1.0, default=TierReport(waiting=1)), 3) == 3
    waits = told(1.0, default=TierReport(waiting=100, oldest_s=100))
    assert targets(policy, waits, 3) == 3, "this was heard before"
    assert targets(policy, {}, 3) == 3


def test_a_report_that_is_not_complete_is_none(policy):
    metrics = told(1.0, priority=TierReport(waiting=100))
    del metrics["tier/flex/arrived"]
    assert targets(policy, metrics, 2) == 2


def test_of_two_models_the_last_word_counts(policy):
    old, new = told(1.0, "old", priority=TierReport(waiting=50)), told(2.0, "new")
    metrics = {name: old[name] | new[name] for name in new}
    assert targets(policy, metrics, 1) == 1


def test_an_error_keeps_everything_as_it_is(policy, caplog, monkeypatch):
    monkeypatch.setattr(Scaler, "decide", lambda *_: 1 / 0)
    assert targets(policy, told(1.0), 5) == 5
    assert "cannot decide" in caplog.text


def test_arguments_are_refused_without_bringing_the_controller_down(caplog):
    made = AutoscalingPolicy(policy_function=POLICY_PATH).get_policy()(sleep_after_s=5)
    assert targets(made, told(1.0, priority=TierReport(waiting=20))) > 1
    assert "policy_kwargs are not used" in caplog.text


def test_settings_come_with_the_report(policy):
    flex = TierReport(waiting=100)
    metrics = told(1.0, flex=flex)
    assert targets(policy, metrics) == 1
    metrics = told(2.0, flex=flex)
    metrics["settings/flex_replicas"]["replica"][-1].value = 3.0
    assert targets(policy, metrics) == 3
