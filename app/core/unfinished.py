"""Begins what is awaited without a task, and has a task await the rest if there is one. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from functools import partial
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Unfinished(Generic[Result]):
    """What is left of an awaitable that has begun, to be awaited once, by a task."""

    __slots__ = ("_steps", "_waits_for")

    def __init__(self, steps: Generator[Any, Any, Result], waits_for: object) -> None:
        self._steps, self._waits_for = steps, waits_for

    def __await__(self) -> Generator[Any, Any, Result]:
        waits_for = self._waits_for
        while True:
            try:
                came = yield waits_for
            except BaseException as error:
                # Such as the task's cancellation, which is for what was begun to handle.
                step = partial(self._steps.throw, error)
            else:
                step = partial(self._steps.send, came)
            try:
                waits_for = step()
            except StopIteration as end:
                result: Result = end.value
                return result


class Finished(Generic[Result]):
    """The result of an awaitable that did not have to wait."""

    __slots__ = ("result",)

    def __init__(self, result: Result) -> None:
        self.result = result


def begin(awaitable: Awaitable[Result]) -> Finished[Result] | Unfinished[Result]:
    """Run an awaitable until it waits for something."""
    steps = awaitable.__await__()
    try:
        return Unfinished(steps, next(steps))
    except StopIteration as end:
        return Finished(end.value)
