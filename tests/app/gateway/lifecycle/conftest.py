import pytest

from deployments.simulator.settings import SimulatedSettings
from tests.support.world import NotedReply, crash


@pytest.fixture(scope="module", autouse=True)
def parts_of_a_world():
    """What ``World`` needs in place of the product's own, in every test here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.gateway.handler.Reply", NotedReply)
        patch.setattr("deployments.simulator.inference.crash", crash)
        # Nobody waits for an engine that looks seldom whether its client has gone.
        patch.setattr(SimulatedSettings, "disconnect_seconds", 0.0)
        yield
