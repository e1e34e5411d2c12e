"""The logs of engines: one file per start, and what a long one held before its last turn.

The descriptor that an engine inherits keeps its log file locked while any of its processes lives,
so that the log of a running engine is never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

KEEP_LOGS = 10
"""Logs kept per name: enough to see how a crash loop began, and few enough to need no space."""

LIMIT_BYTES = 32 << 20
"""The size from which a log is moved aside. A line takes some 100 bytes, so this holds days of an
engine that logs each health check, and the logs of a name take 640 MiB at most."""
OLDER = ".1"
"""What follows a log's name where its older part is."""

_TAIL_BYTES = 64 * 1024
_TAIL_COLUMNS = 500
_STYLING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def open_log(log_dir: Path, name: str, keep: int) -> tuple[Path, int]:
    """Create the log of a new start, and remove old logs. Returns its path and descriptor."""
    log_dir.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    while True:
        path = log_dir / f"{stem}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.log"
        with contextlib.suppress(FileExistsError):  # another start in the same microsecond
            # Readable by this user only, because it may contain prompts.
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            break
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(log, fcntl.LOCK_SH)
    _prune_logs(log_dir, stem, keep)
    return path, log


def _prune_logs(log_dir: Path, stem: str, keep: int) -> None:
    ours = re.compile(re.escape(stem) + r"-\d{8}T\d{6}\.\d{6}Z\.log")
    logs = sorted(path for path in log_dir.iterdir() if ours.fullmatch(path.name))
    for path in logs[: max(len(logs) - keep, 0)]:
        with contextlib.suppress(OSError):  # vanished, or not ours to remove
            if not _is_written(path):
                path.unlink()
                _older(path).unlink(missing_ok=True)


def _is_written(path: Path) -> bool:
    """Return whether a living engine has inherited the descriptor that locks this log."""
    with path.open("rb") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def rotate(path: Path, limit: int) -> bool:
    """Move a log of ``limit`` bytes aside, in place of its older part; return whether it was moved.

    The engine keeps its descriptor, so the file is copied and then emptied. It is open for
    appending, so the engine goes on at its start. What is written between the two is lost.

    Raises:
        OSError: the log is gone or cannot be copied, as on a full disk.
    """
    if path.stat().st_size < limit:
        return False
    unborn = path.with_name(f"{path.name}.new")
    try:
        # Readable by this user only, as the log itself.
        descriptor = os.open(unborn, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with path.open("rb") as log, os.fdopen(descriptor, "wb") as copy:
            shutil.copyfileobj(log, copy, 1 << 20)
        unborn.replace(_older(path))
    except BaseException:
        unborn.unlink(missing_ok=True)
        raise
    os.truncate(path, 0)
    return True


def _older(path: Path) -> Path:
    return path.with_name(path.name + OLDER)


def tail(path: Path, lines: int) -> str:
    end = _end(path, _TAIL_BYTES)
    if len(end) < _TAIL_BYTES:
        end = _end(_older(path), _TAIL_BYTES - len(end)) + end
    text = end.decode(errors="replace")
    last = text.rstrip().split("\n")[-lines:] if lines > 0 else []
    return "\n".join(map(_readable, last))


def _end(path: Path, size: int) -> bytes:
    """Return the last bytes of a file; none if it is not there."""
    try:
        with path.open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - size, 0))
            return log.read(size)
    except OSError:
        return b""


def _readable(line: str) -> str:
    """Return a log line without colours, with progress bars in their last state, cut if long."""
    shown = _STYLING.sub("", line.rstrip().rsplit("\r", 1)[-1])
    return shown if len(shown) <= _TAIL_COLUMNS else shown[:_TAIL_COLUMNS] + "…"
