"""Looks at the board as a browser does: server-sent events, and again whenever they end."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import orjson

from tests.support.cluster import PLAIN
from tests.support.waiting import SLOWEST


class Viewer:
    """What a page of the board would know.

    Attributes:
        states: every state of a model that was received, in order, by application.
        points: the points of each model, as the page keeps them.
        ticks: when each tick came, by ``time.monotonic``.
        connections: how often it has connected.
    """

    def __init__(self, root: str) -> None:
        self.states: dict[str, list[dict[str, Any]]] = {}
        self.points: dict[str, list[Any]] = {}
        self.ticks: list[float] = []
        self.connections = 0
        self._url = f"{root}/board/events"
        self._done = threading.Event()

    def latest(self, application: str) -> dict[str, Any]:
        """The latest state of a model; empty if there is none."""
        return (self.states.get(application) or [{}])[-1]

    def look(self) -> None:
        """Connect again and again, as an EventSource does, until ``stop``."""
        while not self._done.is_set():
            with (
                suppress(httpx.HTTPError),
                httpx.Client(verify=PLAIN, timeout=SLOWEST * 10) as client,
            ):
                self._read(client)
            self._done.wait(0.5)

    def stop(self) -> None:
        """End at the next event."""
        self._done.set()

    def _read(self, client: httpx.Client) -> None:
        with client.stream("GET", self._url) as answer:
            if answer.status_code != 200:
                return
            self.connections += 1
            kind = ""
            for line in answer.iter_lines():
                name, _, text = line.partition(": ")
                if name == "event":
                    kind = text
                elif name == "data":
                    self._take(kind, orjson.loads(text))
                if self._done.is_set():
                    return

    def _take(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "tick":
            self.ticks.append(time.monotonic())
            return
        name = data["application"]
        self.states.setdefault(name, []).append(data["state"])
        known = [] if data["anew"] else self.points.get(name, [])
        self.points[name] = known + data["fine"]


@contextmanager
def looking(root: str):
    """Yield a viewer that looks from a thread of its own."""
    viewer = Viewer(root)
    thread = threading.Thread(target=viewer.look, daemon=True)
    thread.start()
    try:
        yield viewer
    finally:
        viewer.stop()
        thread.join(15)
