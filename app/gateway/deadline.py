"""A deadline for what the current task waits for, at a third of the cost of ``asyncio.timeout``.

It is for the one wait that every request has. Elsewhere use ``asyncio.timeout``.
"""

from __future__ import annotations

import asyncio


class Deadline:
    """A context that cancels what its task waits for at a time, and raises ``TimeoutError`` then.

    Unlike that of ``asyncio.timeout``, it cannot be moved, and it must not have passed already.

    Args:
        at: by the clock of the event loop, in seconds.
    """

    __slots__ = ("_at", "_passed", "_task", "_timer")

    def __init__(self, at: float) -> None:
        self._at = at
        self._passed = False
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_at(self._at, self._pass)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._timer is not None, "the context was entered"
        self._timer.cancel()
        if self._passed and self._task is not None:
            # Somebody else may have cancelled the task as well: that goes on.
            others = self._task.uncancel()
            if kind is asyncio.CancelledError and not others:
                raise TimeoutError

    def _pass(self) -> None:
        assert self._task is not None, "the context was entered"
        self._passed = True
        self._task.cancel()
