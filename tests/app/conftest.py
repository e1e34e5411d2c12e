"""Both databases, each empty at the beginning of every test."""

import pytest
from sqlalchemy import make_url, text

from app.store.database import connect
from tests.support.environment import skip
from tests.support.postgres import binaries, postgres_server

NO_POSTGRES = "PostgreSQL's server is not installed (apt-get install postgresql)"


@pytest.fixture(scope="session")
def postgres():
    if binaries() is None:
        skip(NO_POSTGRES)
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return make_url(f"sqlite:///{tmp_path}/ledger/usage.db")
    url = request.getfixturevalue("postgres").url
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


@pytest.fixture
def engine(url):
    engine = connect(url)
    yield engine
    engine.dispose()
