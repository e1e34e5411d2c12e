"""Records the requests that reached the engine, for tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from app.contracts.traffic import TTFT_BOUNDS_S, Histogram


class SeenRequest(NamedTuple):
    """An inference request as it was received."""

    number: int
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class EngineState(NamedTuple):
    """What an engine's metrics show.

    Attributes:
        running, waiting, preemptions: of its scheduler.
        usage: the share of its slots that is taken.
        timings: what was timed and counted since it started.
    """

    running: int
    waiting: int
    preemptions: int
    usage: float
    timings: Timings


class Timings:
    """Times of requests inside the engine, and tokens of their prompts, since it started."""

    def __init__(self) -> None:
        self.queue = Histogram(TTFT_BOUNDS_S)
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were cached."""
        return self.cached_tokens / max(self.prompt_tokens, 1)


class Observations:
    """The last inference requests, and how many there were."""

    def __init__(self, remembered: int) -> None:
        self.received = 0
        self.aborted = 0
        self._requests: deque[SeenRequest] = deque(maxlen=remembered)

    def record(self, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> int:
        """Record a request; return its number, counting from 1."""
        self.received += 1
        self._requests.append(SeenRequest(self.received, path, headers, body))
        return self.received

    def forget(self) -> None:
        """Forget all requests, and reset the counts."""
        self.received = self.aborted = 0
        self._requests.clear()

    def report(self) -> list[dict[str, Any]]:
        """Return the recorded requests; a body that is not JSON is text."""
        return [
            {
                "number": seen.number,
                "path": seen.path,
                "headers": {
                    name.decode("latin-1"): value.decode("latin-1") for name, value in seen.headers
                },
                "body": _decoded(seen.body),
            }
            for seen in self._requests
        ]


def _decoded(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")
