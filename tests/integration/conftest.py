import pytest

from tests.serving import ingress_app, local_serve, simulated_app


@pytest.fixture(scope="session")
def frontline():
    """One cluster for all integration tests, with models on simulated engines."""
    with local_serve() as deployment:
        deployment.deploy(
            ingress_app(),
            simulated_app("native", embedding_dimensions=16),
            simulated_app("fcfs", policy="fcfs"),
        )
        deployment.wait_ready("native", "fcfs")
        yield deployment
