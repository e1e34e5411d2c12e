"""How engines start on this machine, from the reports that their replicas write."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from app.contracts.start import StartReport

STALE_S: Final = 30.0
"""A start whose report is older has ended without a word. Replicas write theirs every second."""


class Starts:
    """Reads the reports of one Ray session.

    Args:
        folder: returns where they are; ``None`` while there is no session.
        clock: Unix time, in seconds.
    """

    def __init__(
        self, folder: Callable[[], Path | None], clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._told: set[Path] = set()

    def failures(self) -> list[str]:
        """Return what to say of each start that has failed since the last call."""
        texts = []
        for path, report in self._reports():
            if report.failure is not None and path not in self._told:
                self._told.add(path)
                texts.append(f"{report.model}: {report.failure.report()}")
        return texts

    def progress(self) -> list[str]:
        """Return what each engine that is starting does, how long it takes and usually takes."""
        return [self._progress(report) for _, report in self._reports() if not report.ended]

    def _is_current(self, path: Path, report: StartReport) -> bool:
        """Whether a replica is at it: one that was killed while it started says nothing more."""
        return report.ended or self._clock() - path.stat().st_mtime < STALE_S

    def _progress(self, report: StartReport) -> str:
        parts = [report.phase or "starting", f"{self._clock() - report.began:.0f} s"]
        if report.usual_s is not None:
            parts.append(f"last time {report.usual_s:.0f} s")
        return f"{report.model}, pool {report.pool}: {', '.join(parts)}"

    def _reports(self) -> list[tuple[Path, StartReport]]:
        folder, found = self._folder(), []
        for path in folder.glob("start_*.json") if folder is not None else ():
            # It may be of another version, or have just gone.
            with suppress(OSError, ValueError):
                report = StartReport.from_json(path.read_bytes())
                if self._is_current(path, report):
                    found.append((path, report))
        return sorted(found, key=lambda one: one[1].began)
