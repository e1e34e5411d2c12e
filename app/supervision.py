"""Background work: where tasks and threads that outlive a request are started.

Whatever fails here is logged with its traceback and counted by name, and work that is to go on is
started again after a pause. ``Registry`` keeps the counts.

    keep_running(name, work)   a task that runs until it is cancelled, restarted when it fails
    run_once(name, work)       a task that ends by itself; its failure is reported, not retried
    keep_thread(name, work)    a thread that runs until ``work`` returns, restarted when it fails

A restart calls ``work`` anew, so what must survive a failure is kept outside of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

FIRST_PAUSE_S: Final = 0.2
"""Pause before the first restart; it doubles with each further one."""
LONGEST_PAUSE_S: Final = 10.0
"""Longest pause before a restart: how long recovery can take once the cause is gone."""
RECENT_S: Final = 60.0
"""How long a failure counts as recent; work that has run for so long starts from the first pause
again."""
CANCEL_AGAIN_S: Final = 5.0
"""How long a cancelled task may take to clean up before it is cancelled again."""

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Failures:
    """What has failed under one name.

    Attributes:
        count: failures since the process started.
        restarts: how many of them were followed by a restart.
        last_error: the type of the last one; its message may name addresses or paths.
        last_at: when that was, by the monotonic clock, in seconds.
    """

    count: int
    restarts: int
    last_error: str
    last_at: float


class Registry:
    """Counts failures of background work by name. May be used from any thread."""

    def __init__(self) -> None:
        self._failures: dict[str, Failures] = {}
        self._started: set[str] = set()
        self._lock = threading.Lock()

    def started(self, name: str) -> None:
        """Record that work of this name has been started."""
        with self._lock:
            self._started.add(name)

    def names(self) -> set[str]:
        """Return the names of all work that was ever started or has failed."""
        with self._lock:
            return self._started | self._failures.keys()

    def failed(
        self, name: str, error: BaseException, *, restarts: bool = True, about: str = ""
    ) -> None:
        """Count a failure, and log it with its traceback.

        Args:
            name: of the work.
            error: what it has failed with.
            restarts: whether it goes on.
            about: what the work is for, such as a model's name; logged, not counted by.
        """
        with self._lock:
            old = self._failures.get(name, Failures(0, 0, "", 0.0))
            count = old.count + 1
            self._failures[name] = Failures(
                count, old.restarts + restarts, type(error).__name__, time.monotonic()
            )
        what = f"{name} ({about})" if about else name
        then = "it is restarted" if restarts else "it is not restarted"
        _log.error("%s failed, %s; failures so far: %d", what, then, count, exc_info=error)

    def failures(self) -> dict[str, Failures]:
        """Return what has failed so far, by name."""
        with self._lock:
            return dict(self._failures)

    def recent(self, now: float, within_s: float = RECENT_S) -> dict[str, Failures]:
        """Return what has failed within the last seconds before ``now``, by name."""
        return {n: f for n, f in self.failures().items() if now - f.last_at < within_s}


PROCESS: Final = Registry()
"""The registry of this process."""

# The event loop itself holds tasks only weakly.
_tasks: set[asyncio.Task[Any]] = set()


def keep_running(
    name: str,
    work: Callable[[], Awaitable[None]],
    registry: Registry = PROCESS,
    *,
    about: str = "",
) -> asyncio.Task[None]:
    """Run ``work`` on the running event loop until it returns or the task is cancelled.

    Args:
        name: what it is called in logs and counts; no ids, so that there are few names.
        work: called again after a pause whenever what it returned has failed.
        registry: where failures are counted.
        about: what the work is for, such as a model's name; logged, not counted by.
    """
    registry.started(name)
    return _hold(name, _keep_running(_Work(name, work, registry, about)))


def run_once(
    name: str,
    work: Callable[[], Awaitable[None]],
    registry: Registry = PROCESS,
    *,
    about: str = "",
) -> asyncio.Task[None]:
    """Run ``work`` once on the running event loop; a failure is reported, not raised."""
    registry.started(name)
    return _hold(name, _run_once(_Work(name, work, registry, about)))


def keep_thread(
    name: str,
    work: Callable[[], None],
    *,
    stop: threading.Event | None = None,
    registry: Registry = PROCESS,
) -> threading.Thread:
    """Run ``work`` on a daemon thread until it returns, and return the started thread.

    Args:
        name: of the thread, in logs and in counts.
        work: called again after a pause whenever it has failed.
        stop: once it is set, there is no restart, and a pause ends at once.
        registry: where failures are counted.
    """
    ending = stop or threading.Event()
    registry.started(name)

    def run() -> None:
        pauses = Pauses()
        while True:
            try:
                work()
                return
            except Exception as error:
                registry.failed(name, error, restarts=not ending.is_set())
            if ending.wait(pauses.next()):
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


async def stop(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and return once all of them have ended.

    A cancellation can be lost: a ``gather`` whose part fails at the same moment raises that error
    instead. So tasks that go on are cancelled again.
    """
    running = {task for task in tasks if task is not None}
    while running:
        for task in running:
            task.cancel()
        ended, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
        for task in ended:
            if not task.cancelled():
                # Its supervision has reported it; asyncio would log it as never retrieved.
                task.exception()


def _hold(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work, name=name)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


@dataclass(frozen=True, slots=True)
class _Work:
    name: str
    call: Callable[[], Awaitable[None]]
    registry: Registry
    about: str

    async def fails(self, *, restarts: bool) -> bool:
        """Run it, and return whether it has failed, which is then reported."""
        try:
            await self.call()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Something that it waited for was cancelled, which is no reason for it to end.
            self.registry.failed(self.name, error, restarts=restarts, about=self.about)
        except Exception as error:
            self.registry.failed(self.name, error, restarts=restarts, about=self.about)
        else:
            return False
        return True


async def _keep_running(work: _Work) -> None:
    pauses = Pauses()
    while True:
        if not await work.fails(restarts=True):
            return
        await asyncio.sleep(pauses.next())


async def _run_once(work: _Work) -> None:
    await work.fails(restarts=False)


class Pauses:
    """Exponential back-off that starts anew after a run of ``RECENT_S``.

    The pauses are spread: what one cause has ended in many processes does not return all at once.
    """

    def __init__(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        self._last = time.monotonic()

    def next(self) -> float:
        """Return the pause after a run that has just failed."""
        now = time.monotonic()
        if now - self._last > RECENT_S:
            self._pause_s = FIRST_PAUSE_S
        self._last = now
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)
