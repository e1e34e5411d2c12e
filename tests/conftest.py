"""Settings of Ray and Serve that tests need beside those of ``scripts/activate``."""

import os
import socket

import pytest
from hypothesis import settings

# On a loaded machine an example may take any time. Where nobody is there to look into a new
# counterexample the examples are the same every time; developers' runs go on finding new ones.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")

if "RAY_SERVE_HAPROXY_BINARY_PATH" not in os.environ:
    pytest.exit("run scripts/test, or `FRONTLINE_ENV=test . scripts/activate` before pytest", 2)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# They are read when Ray is imported.
os.environ |= {
    # A test's cluster lives beside others on the machine, such as one from scripts/run.
    "RAY_SERVE_HAPROXY_METRICS_PORT": _free_port(),
    "RAY_SERVE_HAPROXY_STATS_PORT": _free_port(),
    # Nothing is worth waiting half a minute for when a test is over.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # For this process alone (local_serve takes it out again): tests call handles from threads
    # without an event loop.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
}
os.environ.pop("RAY_ADDRESS", None)


def pytest_addoption(parser):
    parser.addoption(
        "--contract-pool",
        metavar="FILE",
        help="run the engines' contract over this pool alone; given by scripts/gpu_check",
    )


@pytest.fixture(scope="session")
def cluster():
    """One local Ray cluster with Serve for all tests of a run that need one."""
    # Imports Ray, which the settings above must precede and most tests do without.
    from tests.serving import local_serve

    with local_serve() as deployment:
        yield deployment
