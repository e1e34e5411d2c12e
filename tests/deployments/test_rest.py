"""What Serve's word on a deployment without replicas means."""

import pytest
from ray.serve._private.common import (
    DeploymentStatus,
    DeploymentStatusInfo,
    DeploymentStatusInternalTrigger,
    DeploymentStatusTrigger,
)

from deployments.rest import Standing, read_standing

pytestmark = pytest.mark.unit

STARTED = DeploymentStatusTrigger.CONFIG_UPDATE_STARTED
EVENTS = DeploymentStatusInternalTrigger


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], Standing.AWAY),  # it is being deployed
        ([EVENTS.HEALTHY], Standing.ASLEEP),
        ([EVENTS.HEALTHY, EVENTS.AUTOSCALE_DOWN], Standing.ASLEEP),
        ([EVENTS.HEALTHY, EVENTS.AUTOSCALE_UP], Standing.WAKING),
        ([EVENTS.HEALTHY, EVENTS.HEALTH_CHECK_FAILED], Standing.AWAY),
        ([EVENTS.HEALTHY, EVENTS.AUTOSCALE_UP, EVENTS.REPLICA_STARTUP_FAILED], Standing.AWAY),
        ([EVENTS.HEALTHY, EVENTS.CONFIG_UPDATE], Standing.AWAY),
    ],
)
def test_what_has_happened_tells_why_nobody_is_there(events, expected):
    """Serve's own state machine makes the status."""
    told = DeploymentStatusInfo("vllm", DeploymentStatus.UPDATING, STARTED)
    for event in events:
        told = told.handle_transition(trigger=event)
    assert read_standing(told) is expected
