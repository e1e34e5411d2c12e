"""The database behind the store: connecting to it, and bringing its tables up to date."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, text

from app.store import sqlite_file

CONNECT_TIMEOUT_S: Final = 5
"""How long a database may take to answer. Nobody waits for it but the flusher and the CLI."""
_MIGRATIONS: Final = Path(__file__).with_name("migrations")
# Any number will do that nobody else uses: PostgreSQL's advisory locks have no names.
_MIGRATION_LOCK: Final = 0x46_52_4F_4E_54
_LOOK_EVERY: Final = 100_000
"""Steps of SQLite's machine between two looks at the clock: about a millisecond."""
_BEGIN: Final = "sqlite_begin"
# Alembic keeps what it is doing in variables of its modules.
_migrating = Lock()


class StoreAway(Exception):
    """The database cannot be used now. The message says of what kind the trouble is."""


class StoreTooSlow(StoreAway):
    """The database took longer for a statement than it may, and was stopped."""


class StoreRefuses(StoreAway):
    """The database does not take what it was given, and would not take it again either."""


@contextmanager
def translated() -> Iterator[None]:
    """Translate whatever SQLAlchemy raises; nothing of a password is in the message.

    Raises:
        StoreAway: instead.
        StoreTooSlow: where a statement took too long.
        StoreRefuses: where it is the values that the database does not take.
    """
    try:
        yield
    except (exc.DataError, exc.IntegrityError) as error:
        raise StoreRefuses(_first_line(error.orig)) from None
    except exc.DBAPIError as error:
        if _was_stopped(error.orig):
            raise StoreTooSlow(_first_line(error.orig)) from None
        raise StoreAway(_first_line(error.orig)) from None
    except exc.SQLAlchemyError as error:
        raise StoreAway(type(error).__name__) from None
    except OSError as error:
        # SQLite's file or its folder cannot be looked at.
        raise StoreAway(f"{type(error).__name__}: {error.strerror}") from None


def connect(url: URL, *, connections: int = 2, statement_timeout_s: float | None = None) -> Engine:
    """Return an engine for the database; no connection is made yet.

    Args:
        url: where it is.
        connections: how many are kept; a few more may be made when they are all in use.
        statement_timeout_s: longest time that one statement may take, or on SQLite one
            transaction; ``None`` for a minute, and no limit on SQLite.

    SQLite's file and its folder are made when they are missing, and opened anew where they were
    replaced (``app.store.sqlite_file``).
    """
    if url.get_backend_name() == "sqlite":
        return _connect_sqlite(url, connections, statement_timeout_s)
    timeout_s = 60.0 if statement_timeout_s is None else statement_timeout_s
    return create_engine(
        url,
        hide_parameters=True,
        # A connection that a database's restart has cut is noticed before it is used.
        pool_pre_ping=True,
        pool_size=connections,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            # A database host that vanishes without a word must not block for the two hours of
            # TCP's own patience.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,
            # Zero would be no limit.
            "options": f"-c timezone=UTC -c statement_timeout={max(1, int(timeout_s * 1000))}",
        },
    )


def _connect_sqlite(url: URL, connections: int, timeout_s: float | None) -> Engine:
    path = sqlite_file.path_of(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # One in memory is there once: its pool has no size.
    pool = {} if path is None else {"pool_size": connections}
    engine = create_engine(
        url, hide_parameters=True, connect_args={"timeout": CONNECT_TIMEOUT_S}, **pool
    )
    if path is not None:
        sqlite_file.follow(engine, path)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        # Transactions begin where SQLAlchemy begins them, so that changes of tables are in them.
        connection.isolation_level = None
        # Readers do not block the writer; and what was committed survives a loss of power, since
        # the journal forgets it then.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "checkout")
    def limit(connection: Any, record: object, proxy: object) -> None:
        if timeout_s is None:
            return
        ends = time.monotonic() + timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > ends, _LOOK_EVERY)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))

    return engine


def migrate(engine: Engine) -> bool:
    """Bring the tables up to date, and return whether there was anything to do.

    Several processes may call it at once: one does it, the others wait for it.

    Raises:
        StoreAway: the database cannot be used, or was made by a newer version of Frontline.
    """
    with _migrating, translated(), begin_write(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        return _upgrade(connection)


@contextmanager
def begin_write(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in a transaction that writes what depends on what it reads.

    SQLite's only writer is chosen at its beginning, not at its first write, when what was read may
    have changed. In PostgreSQL rows are locked by ``with_for_update``.
    """
    with engine.connect() as plain:
        connection = plain.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
        with connection.begin():
            yield connection


def _upgrade(connection: Connection) -> bool:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    steps = ScriptDirectory.from_config(config)
    current, newest = (
        MigrationContext.configure(connection).get_current_revision(),
        steps.get_current_head(),
    )
    if current == newest:
        return False
    if current is not None and current not in {step.revision for step in steps.walk_revisions()}:
        raise StoreAway(f"its tables are of a newer version ({current})")
    command.upgrade(config, "head")
    return True


def _was_stopped(error: BaseException | None) -> bool:
    # PostgreSQL's query_canceled, and SQLite's own name.
    codes = (getattr(error, "sqlstate", None), getattr(error, "sqlite_errorname", None))
    return codes[0] == "57014" or codes[1] == "SQLITE_INTERRUPT"


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
