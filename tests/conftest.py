"""Which tests run, and in what order; the cluster that they share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.support import environment
from tests.support.waiting import SLOWEST

# On a loaded machine an example may take any time. Where nobody is there to look into a new
# counterexample the examples are the same every time; developers' runs go on finding new ones.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")

# Ray reads its settings when it is imported, which tests without a cluster do as well.
if environment.is_active():
    environment.prepare()


def pytest_addoption(parser):
    parser.addoption(
        "--contract-pool",
        metavar="FILE",
        help="run the engines' contract over this pool alone; given by scripts/gpu_check",
    )


LONGEST = (
    # Not long. Ray's agents export late, or not at all, in a cluster that has had twenty minutes of
    # tests: these read what they export.
    "integration/test_monitoring.py",
    "integration/test_board.py",
    "integration/test_cluster.py",
    "integration/test_late_nodes.py",
    "engines/test_several_nodes.py",
    "engines/test_contract.py",
    "engines/test_three_engines.py",
    "engines/test_autoscaling.py",
    "integration/test_autoscaling.py",
    "faults/test_failures.py",
    "faults/test_serving.py",
    "faults/test_draining.py",
    "faults/test_node_removed.py",
    "integration/test_queue.py",
    "integration/test_engine_loss.py",
)
"""Modules that come first. Most take a minute and more: otherwise the last of them would keep one
worker busy while the others have nothing left."""


FOLDERS = {
    "integration": ("engines", "integration"),
    "faults": ("app/gateway/lifecycle", "faults", "integration"),
    "engine": ("engines",),
}
"""Where the tests are that have a marker of these, and nowhere else."""


def _is_in(path, *markers):
    here = Path(__file__).parent
    return any(path.is_relative_to(here / one) for marker in markers for one in FOLDERS[marker])


def pytest_ignore_collect(collection_path, config):
    """Leave modules unread that have none of a stage's tests: all take a worker 13 s of CPU."""
    asked = set(config.option.markexpr.split()) - {"or"}
    some = asked and asked <= FOLDERS.keys()
    if not some or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return None
    return True if collection_path.suffix and not _is_in(collection_path, *asked) else None


def _skip_without_environment(items):
    if environment.is_active():
        return
    for item in items:
        if any(mark.name in FOLDERS for mark in item.iter_markers()):
            item.add_marker(pytest.mark.skip(reason=environment.MISSING))


def _check_folders(items):
    here = Path(__file__).parent
    for named in {*LONGEST, *(one for folders in FOLDERS.values() for one in folders)}:
        if not (here / named).exists():
            raise pytest.UsageError(f"tests/conftest.py names {named!r}, which is not there")
    for item in items:
        for mark in item.iter_markers():
            if mark.name in FOLDERS and not _is_in(item.path, mark.name):
                raise pytest.UsageError(f"{item.nodeid} is not in FOLDERS[{mark.name!r}]")


def _give_time(items):
    """Let each test take longer than it says, and than pyproject.toml says of all."""
    for item in items:
        own = item.get_closest_marker("timeout")
        seconds = own.args[0] if own else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(SLOWEST * seconds), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Bring the longest modules to the front, the others as they were."""
    _check_folders(items)
    _skip_without_environment(items)
    _give_time(items)
    ranks = {f"tests/{module}": rank for rank, module in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


class ByDeployment(LoadScopeScheduling):
    """Gives tests that share what they deploy to one pytest-xdist worker: mostly a module's."""

    def _split_scope(self, nodeid):
        module, _, test = nodeid.partition("::")
        if not module.startswith("tests/engines/"):
            return module
        # A real engine takes longest to start: all its tests go where it runs.
        if module.endswith("test_vllm.py") or "[vllm" in test:
            return "vllm"
        if module.endswith("test_sglang.py") or "[sglang" in test:
            return "sglang"
        return module

    def _reschedule(self, node):
        # One more than it runs is what a worker must know. A module given to it earlier would wait
        # for it while another worker has nothing to do.
        if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def pytest_xdist_make_scheduler(config, log):
    """Say how tests are shared among pytest-xdist's workers."""
    config.option.loadscopereorder = False  # they are in order
    return ByDeployment(config, log)


@pytest.fixture(scope="session")
def cluster():
    """One local Ray cluster with Serve for all tests of a run that need one."""
    # Imports Ray, which the settings above must precede and most tests do without.
    from tests.support.cluster import local_serve

    with local_serve() as deployment:
        yield deployment
