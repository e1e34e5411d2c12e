"""The logs of engines: one file a start.

The engine's own descriptor locks its file for as long as anything of it lives, so that no log is
removed under it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from datetime import UTC, datetime
from pathlib import Path

KEEP_LOGS = 10
"""Logs kept of one name: enough to see a crash loop begin, little enough never to matter."""

_TAIL_BYTES = 64 * 1024
_TAIL_COLUMNS = 500
_STYLING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def open_log(log_dir: Path, name: str, keep: int) -> tuple[Path, int]:
    """Make the log of a new start, and remove old ones. Returns its path and file descriptor."""
    log_dir.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    while True:
        path = log_dir / f"{stem}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.log"
        with contextlib.suppress(FileExistsError):  # another start in the same microsecond
            # Only for this user: prompts may be in it.
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


def _is_written(path: Path) -> bool:
    """Whether a living engine holds this log: it inherited the descriptor that locks the file."""
    with path.open("rb") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def tail(path: Path, lines: int) -> str:
    try:
        with path.open("rb") as log:
            start = max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0)
            log.seek(start)
            text = log.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    last = text.rstrip().split("\n")[-lines:] if lines > 0 else []
    return "\n".join(map(_readable, last))


def _readable(line: str) -> str:
    """One log line without colours, progress bars at their last state, and cut if very long."""
    shown = _STYLING.sub("", line.rstrip().rsplit("\r", 1)[-1])
    return shown if len(shown) <= _TAIL_COLUMNS else shown[:_TAIL_COLUMNS] + "…"
