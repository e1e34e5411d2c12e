"""The news of all models, fetched once a second while somebody looks at the board."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final, Protocol

import orjson

from app import supervision
from app.contracts.news import ModelNews
from app.core import errors
from app.history.recorder import POINT_S
from app.history.rings import COARSE, SECONDS

MOST_VIEWERS: Final = 64
"""Viewers of one ingress at once. Each takes one connection and, once a second, 1 KB a model."""
BEHIND: Final = 10
"""Seconds of news that may wait for a viewer who does not read. Then the viewer is dropped, and
comes back with the whole history."""
_FULL_S: Final = 5.0


class NewsSource(Protocol):
    """Where news come from: ``app.gateway.registry.ModelRegistry``."""

    async def news(self, seen: Mapping[str, tuple[str, int]]) -> dict[str, ModelNews | None]:
        """Return the news of every model, by its application; ``None`` for one that is away."""
        ...


class Viewer:
    """Somebody who looks at the board.

    Attributes:
        dropped: whether the viewer reads too slowly, and is to be let go.
    """

    def __init__(self, first: Mapping[str, ModelNews]) -> None:
        self.dropped = False
        self._first = dict(first)
        self._news: asyncio.Queue[bytes] = asyncio.Queue(BEHIND)

    def offer(self, news: bytes) -> None:
        """Add news, unless too many wait already."""
        try:
            self._news.put_nowait(news)
        except asyncio.QueueFull:
            self.dropped = True

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the history, one model at a time, then the news; ends when dropped."""
        # Encoded one by one as they are read: all histories together may take megabytes.
        while self._first:
            name = next(iter(self._first))
            yield _event(name, self._first.pop(name), anew=True)
        while not self.dropped:
            yield await self._news.get()


class BoardFeed:
    """Fetches the news of all models for the viewers of one ingress.

    There is one task for all of them, which runs while there is at least one.
    """

    def __init__(self, source: NewsSource) -> None:
        self._source = source
        self._viewers: set[Viewer] = set()
        self._models: dict[str, _Mirror] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether news are fetched now."""
        return self._task is not None

    def join(self) -> Viewer:
        """Add a viewer, who must ``leave``.

        Raises:
            Unavailable: there are as many as there may be.
        """
        if len(self._viewers) >= MOST_VIEWERS:
            raise errors.Unavailable(
                "Too many people look at the board through this ingress. Try again in a moment.",
                "board_full",
                _FULL_S,
            )
        viewer = Viewer({name: one.whole() for name, one in self._models.items()})
        self._viewers.add(viewer)
        if self._task is None:
            self._task = supervision.keep_running("board feed", self._fetch)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Remove a viewer."""
        self._viewers.discard(viewer)
        if not self._viewers:
            self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = None
        # Without a task it grows old.
        self._models = {}

    async def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + POINT_S
            seen = {name: one.seen for name, one in self._models.items()}
            event = self._take(await self._source.news(seen))
            for viewer in self._viewers:
                viewer.offer(event)
            await asyncio.sleep(max(0.0, due - loop.time()))

    def _take(self, news: Mapping[str, ModelNews | None]) -> bytes:
        """Take news over, and return them as events."""
        for gone in self._models.keys() - news.keys():
            del self._models[gone]
        events = []
        for name, one in news.items():
            if one is not None:
                mirror = self._models.setdefault(name, _Mirror())
                events.append(mirror.take(name, one))
        away = sorted(name for name, one in news.items() if one is None)
        tick = {"models": sorted(news), "away": away}
        return b"".join([*events, b"event: tick\ndata: ", orjson.dumps(tick), b"\n\n"])


class _Mirror:
    """The history of one model as far as this ingress has fetched it."""

    def __init__(self) -> None:
        self.seen = ("", 0)
        self._state = b"{}"
        self._fine: deque[bytes] = deque(maxlen=SECONDS)
        self._coarse: deque[bytes] = deque(maxlen=COARSE)

    def take(self, name: str, news: ModelNews) -> bytes:
        """Take news over, and return them as an event."""
        anew = news.life != self.seen[0]
        if anew:
            self._fine.clear()
            self._coarse.clear()
        self.seen, self._state = (news.life, news.number), news.state
        self._fine.extend(news.fine)
        self._coarse.extend(news.coarse)
        return _event(name, self.whole() if anew else news, anew=anew)

    def whole(self) -> ModelNews:
        """Return everything that is known. It shares its rows."""
        return ModelNews(*self.seen, self._state, tuple(self._fine), tuple(self._coarse))


def _event(name: str, news: ModelNews, *, anew: bool) -> bytes:
    """Return the event of one model; ``anew``: it replaces all that its receiver has."""
    return b"".join(
        (
            b'event: model\ndata: {"application":', orjson.dumps(name),
            b',"anew":', b"true" if anew else b"false",
            b',"state":', news.state,
            b',"fine":[', b",".join(news.fine),
            b'],"coarse":[', b",".join(news.coarse), b"]}\n\n",
        )
    )  # fmt: skip
