"""The file behind a SQLite store, which somebody may replace or delete while it is open.

A connection to a file that was replaced goes on writing to the old one, which nobody finds any
more. So each time a connection is taken from the pool the path is looked at, which takes about a
microsecond, and where there is another file, it is opened instead.

The write-ahead log is found by its name. One that belongs to the old file would be taken for a part
of the new one, which destroys it; so it is put aside first, as `PATH-wal.replaced-INODE`.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, event, exc

Identity = tuple[int, int]
"""A file and no other: its device and inode. ``MISSING`` where there is none."""
MISSING: Final[Identity] = (0, 0)

_FILE: Final = "frontline_file"
_LOG: Final = "frontline_log"
_SIDES: Final = ("-wal", "-shm")

_log = logging.getLogger(__name__)


def path_of(url: URL) -> Path | None:
    """Return the path of a SQLite store; ``None`` for other databases, and for one in memory."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


def identity(path: Path) -> Identity:
    """Return which file a path leads to now."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return MISSING
    return stat.st_dev, stat.st_ino


def follow(engine: Engine, path: Path) -> None:
    """Have an engine open the file anew whenever the path leads to another one."""
    log = Path(f"{path}-wal")

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection, record.info[_FILE] = _opened(
            path, lambda: dialect.connect(*arguments, **options)
        )
        return connection

    @event.listens_for(engine, "checkout")
    def check(connection: object, record: Any, proxy: object) -> None:
        if identity(path) == record.info[_FILE]:
            return
        _log.error("the store's file was replaced or deleted; it is opened anew")
        _put_log_aside(path, record.info.get(_LOG, MISSING))
        raise exc.InvalidatePoolError

    @event.listens_for(engine, "checkin")
    def note_log(connection: object, record: Any) -> None:
        # Made by the first transaction, and removed with the last connection.
        if record.info.get(_FILE) == identity(path):
            record.info[_LOG] = identity(log)


def was_replaced(connection: Connection) -> bool:
    """Return whether the file that a connection has written to is not the store any more."""
    path = path_of(connection.engine.url)
    return path is not None and connection.info[_FILE] != identity(path)


def _opened(path: Path, connect: Callable[[], Any]) -> tuple[Any, Identity]:
    """Return a connection, and the file that it is to for sure."""
    while True:
        before = identity(path)
        connection = connect()
        if before == identity(path):
            return connection, before
        # It was made by this, or replaced meanwhile.
        connection.close()


def _put_log_aside(path: Path, old: Identity) -> None:
    """Rename the log of a file that was replaced, if it is still there."""
    if old == MISSING:
        return
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        # Another process that puts the same one aside may have begun a new one meanwhile.
        fcntl.flock(folder, fcntl.LOCK_EX)
        if identity(Path(f"{path}-wal")) != old:
            return
        for side in _SIDES:
            with suppress(FileNotFoundError):
                os.rename(f"{path}{side}", f"{path}{side}.replaced-{old[1]}")
        _log.error("the write-ahead log of the file that was replaced is kept as %s",
                   f"{path.name}-wal.replaced-{old[1]}")  # fmt: skip
    finally:
        os.close(folder)
