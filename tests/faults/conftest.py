import pytest

from tests.app.conftest import NO_POSTGRES
from tests.support.postgres import binaries, postgres_server


@pytest.fixture
def postgres():
    if binaries() is None:
        pytest.skip(NO_POSTGRES)
    with postgres_server() as server:
        yield server
