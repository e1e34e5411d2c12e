"""The access log: one line of JSON for each inference request, written by a thread of its own.

The event loop only appends the request to a bounded list. The thread makes the lines and writes
them in batches. While it cannot keep up, or the disk fails, lines are dropped and alarmed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from app.config.access_log import AccessLogSettings
from app.core.paths import expand_path
from app.ledger.record import State, now_utc
from app.observe.backlog import Backlog
from app.observe.observers import Context, Ended, Refused

MOST_WAITING: Final = 8192
"""Most requests that wait to be written: about 10 MB."""
_BATCH: Final = 64
"""Lines that are made and written at a time: about 0.3 ms without a pause for the event loop."""
_SANE_ID: Final = re.compile(rb"[!-~]{1,128}")
_CHOICES: Final = 0x10000

_Waiting = tuple[Ended | Refused, datetime]


def _nothing() -> None:
    pass


class AccessLog:
    """Observes requests and logs those that its settings choose. Belongs to the event loop.

    Args:
        path: returns the path of the log file. The settings may replace its folder.
        logged: called, in a request's task, when its line is to be written.
    """

    def __init__(self, path: Callable[[], Path], logged: Callable[[], None] = _nothing) -> None:
        self._path = path
        self._logged = logged
        self._settings = AccessLogSettings(enabled=False)
        self._file: _FileOf | None = None
        self._writer: LineWriter | None = None

    @contextmanager
    def change(self, settings: AccessLogSettings) -> Iterator[LineWriter | None]:
        """Apply changed settings when the context is left without an error.

        Yields the writer that must be closed afterwards, if there is one.

        Raises, when entered:
            OSError: the file cannot be opened.
            SettingsError: the folder names a variable that is not set.
        """
        file = self._file_of(settings)
        if file == self._file:
            yield None
        else:
            writer = None if file is None else LineWriter(*file)
            try:
                yield self._writer
            except BaseException:
                if writer is not None:
                    writer.close()
                raise
            self._file, self._writer = file, writer
        self._settings = settings

    def _file_of(self, settings: AccessLogSettings) -> _FileOf | None:
        if not settings.enabled:
            return None
        path = self._path()
        if settings.folder is not None:
            path = Path(expand_path(settings.folder)) / path.name
        return _FileOf(path, settings.max_bytes, settings.files)

    def ended(self, request: Ended) -> None:
        """Log a request to a known model, if it is chosen."""
        if self._writer is None:
            return
        record = request.record
        if self._chooses(record.origin.request_id, problem=_is_problem(request)):
            self._writer.put(request, record.ended or now_utc())
            self._logged()

    def refused(self, request: Refused) -> None:
        """Log a request that ended before its model was known, if it is chosen."""
        if self._writer is not None and self._chooses(request.request_id, problem=True):
            self._writer.put(request, now_utc())
            self._logged()

    def close(self) -> None:
        """Write what waits, and end the thread. Blocks for the disk."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _chooses(self, request_id: str, *, problem: bool) -> bool:
        settings = self._settings
        if settings.sample == 1 or (problem and settings.problems_always):
            return True
        # The last digits of a request id are random.
        return int(request_id[-4:], 16) < settings.sample * _CHOICES


class _FileOf(NamedTuple):
    path: Path
    max_bytes: int
    files: int


def _is_problem(request: Ended) -> bool:
    """Whether a request was not answered in full at the tier that it requested."""
    record = request.record
    # A completed request has a reason only if its tier is not the requested one.
    return record.state is not State.COMPLETED or record.reason is not None


class LineWriter:
    """Writes lines to one file that rotates, on a thread of its own.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _RotatingFile(path, max_bytes, files)
        self._backlog = Backlog("access log", self._write, most=MOST_WAITING, batch=_BATCH)

    def put(self, request: Ended | Refused, ended: datetime) -> None:
        """Have a request written soon. The call does not block."""
        self._backlog.put((request, ended))

    def close(self) -> None:
        """Write what waits, and end the thread. Blocks for the disk."""
        self._backlog.close()
        self._file.close()

    def _write(self, batch: list[_Waiting]) -> None:
        self._file.write(b"\n".join([line(*waiting) for waiting in batch]).decode())


class _RotatingFile(RotatingFileHandler):
    """A file that rotates, reopens if it was moved or deleted, and raises its errors."""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")

    def write(self, text: str) -> None:
        """Append a text and a line break."""
        if self.stream is not None and not _is_open_at(self.stream.fileno(), self.baseFilename):
            # The handler opens it anew.
            self.close()
        self.emit(logging.makeLogRecord({"msg": text}))

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what was just caught; the handler would print it."""
        raise


def _is_open_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def line(request: Ended | Refused, ended: datetime) -> bytes:
    """Return the line of a request, without the line break. Names are those of usage records."""
    fields = _of_ended(request) if isinstance(request, Ended) else _of_refused(request, ended)
    return orjson.dumps({"time": ended, **fields}, default=_number)


def _of_ended(request: Ended) -> dict[str, Any]:
    record = request.record
    origin, usage = record.origin, record.usage
    return {
        "request_id": origin.request_id,
        **_ids(request.context),
        "tenant": origin.tenant,
        "key_id": origin.key_id,
        "model": origin.model,
        "route": origin.route,
        "stream": origin.stream,
        "requested_tier": origin.requested,
        "served_tier": record.served,
        "state": record.state,
        "reason": record.reason,
        "status": request.status,
        "engine": record.engine or None,
        "replica": record.replica or None,
        "arrived": origin.arrived,
        "queue_s": record.queue_s,
        "ttft_s": record.ttft_s,
        "duration_s": record.duration_s,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "images": usage.images,
        "audio_seconds": usage.audio_seconds,
        "usage_estimated": record.usage_estimated,
        "preemptions": record.preemptions,
        "cost": record.cost,
    }


def _of_refused(request: Refused, ended: datetime) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        **_ids(request.context),
        "tenant": request.tenant,
        "key_id": request.key_id,
        "model": None,
        "route": request.route,
        "stream": None,
        "requested_tier": None,
        "served_tier": None,
        "state": State.REFUSED,
        "reason": request.reason,
        "status": request.status,
        "engine": None,
        "replica": None,
        "arrived": ended - timedelta(seconds=request.duration_s),
        "queue_s": 0.0,
        "ttft_s": None,
        "duration_s": request.duration_s,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "completion_tokens": 0,
        "cache_write_tokens": 0,
        "images": 0,
        "audio_seconds": 0,
        "usage_estimated": False,
        "preemptions": None,
        "cost": Decimal(0),
    }


def _ids(context: Context) -> dict[str, str | None]:
    given = context.client_request_id
    sane = _SANE_ID.fullmatch(given) is not None
    return {
        "client_request_id": given.decode() if sane else None,
        "trace_id": None if context.trace is None else context.trace.trace_id,
    }


def _number(value: object) -> Any:
    if isinstance(value, Decimal):
        # Digit for digit: a float would round it.
        return orjson.Fragment(format(value, "f").encode())
    raise TypeError(type(value).__name__)
