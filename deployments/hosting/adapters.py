"""Keeps the LoRA adapters of one running engine as the model's settings want them.

An adapter that is no longer wanted counts as not loaded at once, so that no ingress places requests
for it here. The engine unloads it a little later, when the ingresses know: requests that were
placed before still find it. A failed try is repeated, and meanwhile concerns nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

from app import alarms
from app.contracts.adapters import AdapterState, WantedAdapter
from app.core.paths import expand_path
from app.core.settings import SettingsError
from app.upstream.http1 import ConnectionLost
from deployments.engines.lora import LoraAdapter

logger = logging.getLogger("ray.serve")

LINGER_S: Final = 5.0
"""How long an adapter stays in the engine after it is no longer wanted, in seconds. The Model asks
for the status twice a second, and ingresses learn of a change at once or within two seconds."""
RETRY_S: Final = 30.0
"""Pause between two tries to load or to unload, in seconds: a folder may be copied meanwhile."""
UNLOAD_S: Final = 10.0
"""The longest wait for an engine to unload, in seconds. SGLang answers only when the last request
that uses the adapter has ended, and names it no more from the beginning."""

Load = Callable[[LoraAdapter], Awaitable[str]]
Unload = Callable[[str], Awaitable[str]]
Listed = Callable[[], Awaitable[frozenset[str]]]


class AdapterKeeper:
    """The adapters of one engine. Belongs to an event loop.

    Args:
        load: has the engine load one; returns why it has not, or nothing.
        unload: has the engine unload one by its name, likewise.
        listed: returns the names of the models that the engine lists.
        about: whose they are, for the log.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        load: Load,
        unload: Unload,
        listed: Listed,
        about: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._unload, self._listed = load, unload, listed
        self._about, self._clock = about, clock
        self._wanted: tuple[WantedAdapter, ...] = ()
        self._loaded: dict[str, WantedAdapter] = {}
        self._failed: dict[WantedAdapter, str] = {}
        self._due: dict[WantedAdapter, float] = {}
        self._changed = asyncio.Event()

    @property
    def states(self) -> tuple[AdapterState, ...]:
        """The adapters that are wanted, as they are now."""
        return tuple(
            AdapterState(one, self._loaded.get(one.name) == one, self._failed.get(one, ""))
            for one in self._wanted
        )

    @property
    def serving(self) -> frozenset[str]:
        """The names of those that requests may use."""
        return frozenset(one.wanted.name for one in self.states if one.loaded)

    def want(self, wanted: tuple[WantedAdapter, ...]) -> None:
        """Change what is wanted. Returns at once; ``run`` does the rest."""
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self._failed = {one: why for one, why in self._failed.items() if one in wanted}
        until = self._clock() + LINGER_S
        leaving = (one for one in self._loaded.values() if one not in wanted)
        self._due = {one: self._due.get(one, until) for one in leaving}
        self._changed.set()

    async def run(self) -> None:
        """Load and unload as it becomes due."""
        while True:
            self._changed.clear()
            await self.settle()
            wait_s = self._next_due() - self._clock()
            try:
                async with asyncio.timeout(wait_s if wait_s < math.inf else None):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def settle(self) -> None:
        """Do what is due now: load first, because unloading may have to wait for requests."""
        for one in self._wanted:
            if one.name not in self._loaded and self._is_due(one):
                await self._load_one(one)
        for one in tuple(self._loaded.values()):
            if one not in self._wanted and self._is_due(one):
                await self._unload_one(one)

    def _is_due(self, one: WantedAdapter) -> bool:
        return self._due.get(one, -math.inf) <= self._clock()

    def _next_due(self) -> float:
        """Return when the next step is due; a name that has just become free is due at once."""
        open_ = [one for one in self._wanted if one.name not in self._loaded]
        open_ += [one for one in self._loaded.values() if one not in self._wanted]
        return min((self._due.get(one, -math.inf) for one in open_), default=math.inf)

    async def _load_one(self, one: WantedAdapter) -> None:
        try:
            # It may have loaded it in a try whose answer was lost, and perhaps from another folder.
            if one.name in await self._listed():
                await self._unload(one.name)
            why_not = await self._load(LoraAdapter(one.name, expand_path(one.path)))
            if not why_not and one.name not in await self._listed():
                why_not = "it does not list the adapter afterwards"
        except (ConnectionLost, SettingsError) as error:
            why_not = str(error) or type(error).__name__
        if not why_not:
            self._loaded[one.name] = one
            self._failed.pop(one, None)
            self._due.pop(one, None)
            logger.info("%s has loaded the adapter %s from %s", self._about, one.name, one.path)
            return
        self._due[one] = self._clock() + RETRY_S
        if one in self._wanted:
            self._failed[one] = why_not
        text = f"{self._about} has not loaded {one.name} from {one.path}, and tries again in "
        alarms.PROCESS.raised("adapter not loaded", f"{text}{RETRY_S:g} s: {why_not}")

    async def _unload_one(self, one: WantedAdapter) -> None:
        try:
            try:
                async with asyncio.timeout(UNLOAD_S):
                    why_not = await self._unload(one.name)
            except (ConnectionLost, TimeoutError) as error:
                why_not = f"no answer: {error or type(error).__name__}"
            gone = not why_not or one.name not in await self._listed()
        except ConnectionLost as error:
            gone, why_not = False, str(error)
        if gone:
            del self._loaded[one.name]
            self._due.pop(one, None)
            logger.info("%s has unloaded the adapter %s", self._about, one.name)
            return
        self._due[one] = self._clock() + RETRY_S
        text = f"{self._about} has not unloaded {one.name}, and tries again in {RETRY_S:g} s"
        alarms.PROCESS.raised("adapter not unloaded", f"{text}: {why_not}")
