"""The watch that looks whether a model's pools can be placed, without a cluster."""

import asyncio

import pytest
from ray.exceptions import RayError, RaySystemError

from app import alarms
from deployments.control import placement
from deployments.control.placement import PlacementWatch

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("error", [RayError, RaySystemError("head"), TimeoutError, ValueError])
async def test_a_failed_look_is_counted_and_logged_and_refuses_no_pool(error, monkeypatch, caplog):
    """It was logged at debug level only, and counted nowhere."""
    monkeypatch.setattr(alarms, "PROCESS", alarms.Alarms())
    # private: three looks would take four seconds
    monkeypatch.setattr(placement, "_LOOK_S", 0.0)

    def fail():
        raise error

    monkeypatch.setattr(placement, "cluster_nodes", fail)
    monkeypatch.setattr(placement, "refused_requests", lambda timeout_s: [])
    watch = PlacementWatch("app", lambda: ["pool"], lambda: None)
    try:
        async with asyncio.timeout(10):
            while alarms.PROCESS.counts().get("nodes not checked", 0) < 3:
                await asyncio.sleep(0.01)
    finally:
        await watch.stop()
    assert watch.missing == {}
    lines = [one.getMessage() for one in caplog.records if "nodes not checked" in one.message]
    assert len(lines) == 1 and lines[0].startswith("nodes not checked: app: ")
