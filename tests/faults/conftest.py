import pytest

from tests.app.store.conftest import NO_POSTGRES
from tests.postgres import binaries, postgres_server


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(__file__.rsplit("/", 1)[0]):
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def postgres():
    if binaries() is None:
        pytest.skip(NO_POSTGRES)
    with postgres_server() as server:
        yield server
