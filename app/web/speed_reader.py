"""How fast models were lately, over the whole cluster, for pages that anybody may load often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import orjson

from app.contracts.news import ModelNews
from app.contracts.speeds import Speeds

KEPT_S: Final = 2.0
"""How old speeds may be. However many pages load them, a Model is asked once in that time by each
ingress."""
UNKNOWN: Final = Speeds()
"""The speeds of a model whose Model actor does not answer."""


class ModelNewsSource(Protocol):
    """Where news come from: ``app.gateway.registry.ModelRegistry``."""

    async def news_of(self, model: str, seen: tuple[str, int]) -> ModelNews | None:
        """Return the news of a model by its id; ``None`` if its Model is away."""
        ...


@dataclass(slots=True)
class _Kept:
    speeds: Speeds = UNKNOWN
    seen: tuple[str, int] = ("", 0)
    at: float = float("-inf")
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class SpeedReader:
    """Reads the speeds in the news of Models, and nothing else of them: these pages are public.

    Args:
        source: where news come from.
        clock: the time, in seconds.
    """

    def __init__(
        self, source: ModelNewsSource, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = source
        self._clock = clock
        self._kept: dict[str, _Kept] = {}

    async def read(self, model: str) -> Speeds:
        """Return the speeds of the model with this id; ``UNKNOWN`` if its Model is away."""
        kept = self._kept.setdefault(model, _Kept())
        async with kept.asking:
            if self._clock() - kept.at >= KEPT_S:
                # The number keeps the Model from sending the history, which is not needed.
                news = await self._source.news_of(model, kept.seen)
                kept.speeds, kept.at = _speeds(news), self._clock()
                if news is not None:
                    kept.seen = (news.life, news.number)
        return kept.speeds


def _speeds(news: ModelNews | None) -> Speeds:
    fields = None if news is None else orjson.loads(news.state).get("speeds")
    # A Model of an older version reports none, and one that has just started neither.
    return UNKNOWN if fields is None else Speeds.from_fields(fields)
