"""Alarms: what should not happen, goes on all the same, and somebody has to look at.

Each is counted by name, and logged at most once in ``EVERY_S`` by name, so that what happens with
every request does not fill the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 60.0
"""How often one alarm is logged, at most."""
NAMES: Final = (
    "access log full",
    "access log lost",
    "adapter not loaded",
    "adapter not unloaded",
    "billed otherwise than echoed",
    "budget alert lost",
    "budget webhook failing",
    "budgets not shared",
    "budgets unread",
    "client address unknown",
    "engine metrics",
    "journal damaged",
    "journal not moved",
    "journal set aside",
    "limits away",
    "node not examined",
    "nodes not checked",
    "observer",
    "odd usage",
    "preemption lost",
    "record refused",
    "refused for request_memory",
    "refused for tenant_request_memory",
    "refused for too_large",
    "sign-in refused",
    "start report",
    "traces full",
    "traces lost",
    "unreadable answer",
    "unreadable event",
)
"""The names of all alarms. Metrics show each with 0 from the start, so that the first one counts as
an increase."""

_log = logging.getLogger("ray.serve")


class Alarms:
    """Counts alarms by name. May be used from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._logged: dict[str, float] = {}
        self._lock = threading.Lock()

    def raised(self, name: str, text: str, error: BaseException | None = None) -> None:
        """Count an alarm, and log it unless it was logged a moment ago.

        Args:
            name: what it is counted by; no ids, so that there are few names.
            text: what has happened, for the log.
            error: what has caused it; logged with its traceback.
        """
        now = self._clock()
        with self._lock:
            count = self._counts[name] = self._counts.get(name, 0) + 1
            quiet = name in self._logged and now - self._logged[name] < EVERY_S
            if not quiet:
                self._logged[name] = now
        if not quiet:
            _log.error("%s: %s; %d times so far", name, text, count, exc_info=error)

    def counts(self) -> dict[str, int]:
        """Return how often each was raised since the process started."""
        with self._lock:
            return dict(self._counts)


PROCESS: Final = Alarms()
"""Those of this process."""
