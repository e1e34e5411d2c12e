"""Writes how a replica's start goes: a file for ``scripts/run`` and ``frontline status`` there, and
a note for its Model, which tells everybody."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from app import alarms
from app.contracts.start import StartFailure, StartReport, note_of


class StartReporter:
    """Keeps one replica's report. A report that cannot be written is alarmed; the start goes on.

    Args:
        path: of the report; each replica has its own.
        usual: the file with the time that the pool's last start took on this machine.
        model: the model's id.
        pool: the pool's name.
        post: leaves the replica's note, or removes it given ``None``; must not wait.
    """

    def __init__(
        self,
        path: Path,
        usual: Path,
        model: str,
        pool: str,
        post: Callable[[bytes | None], None] = lambda note: None,
    ) -> None:
        self._post = post
        self._path = path
        self._usual = usual
        self._report = StartReport(model, pool, began=time.time(), usual_s=_read(usual))

    def starting(self, phase: str = "") -> None:
        """Report that the engine is starting, and what it is doing if that is known."""
        self._write(replace(self._report, phase=phase or self._report.phase))

    def failed(self, failure: StartFailure) -> None:
        """Report that the start has failed."""
        self._write(replace(self._report, failure=failure))

    def ready(self, took_s: float) -> None:
        """Report that the engine is ready, after so many seconds."""
        self._write(replace(self._report, ready=True))
        self._save(self._usual, f"{took_s:.1f}".encode())

    def stopped(self) -> None:
        """Remove the note: the replica stops, maybe in the middle of its start."""
        self._post(None)

    def _write(self, report: StartReport) -> None:
        self._report = report
        self._save(self._path, report.to_json())
        self._post(note_of(report, time.time()))

    def _save(self, path: Path, text: bytes) -> None:
        # Another process never sees half of it. Only this user may read it: logs may be quoted.
        unborn = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(unborn, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
            unborn.replace(path)
        except OSError as error:
            alarms.PROCESS.raised("start report", f"{path} cannot be written", error)
            with suppress(OSError):
                unborn.unlink()


def _read(usual: Path) -> float | None:
    try:
        return float(usual.read_text())
    except (OSError, ValueError):
        # There was no start yet.
        return None
