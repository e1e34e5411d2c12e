import pytest

from tests.app.conftest import NO_POSTGRES
from tests.support.environment import skip
from tests.support.postgres import binaries, postgres_server


@pytest.fixture
def postgres():
    if binaries() is None:
        skip(NO_POSTGRES)
    with postgres_server() as server:
        yield server
