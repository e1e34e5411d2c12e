"""What the engine has seen, so that a test can prove what reached it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson


class SeenRequest(NamedTuple):
    """An inference request as it was received."""

    number: int
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class Observations:
    """The last inference requests, and how many there were."""

    def __init__(self, remembered: int) -> None:
        self.received = 0
        self.aborted = 0
        self._requests: deque[SeenRequest] = deque(maxlen=remembered)

    def record(self, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> int:
        """Remember a request and return its number, counting from 1."""
        self.received += 1
        self._requests.append(SeenRequest(self.received, path, headers, body))
        return self.received

    def forget(self) -> None:
        """Forget all requests and begin counting anew."""
        self.received = self.aborted = 0
        self._requests.clear()

    def report(self) -> list[dict[str, Any]]:
        """Return the remembered requests; a body that is not JSON as text."""
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
