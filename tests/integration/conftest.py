import pytest

from tests.support.cluster import ingress_app, simulated_app


@pytest.fixture(scope="session")
def frontline(cluster):
    """Models on simulated engines, for all integration tests."""
    cluster.deploy(
        ingress_app(),
        simulated_app("native", embedding_dimensions=16),
        simulated_app("fcfs", policy="fcfs"),
    )
    cluster.wait_ready("native", "fcfs")
    return cluster
