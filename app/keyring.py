"""The keys that an ingress knows: read from the store every so often, kept while it is away."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final, Protocol

from app.keys import ApiKey, KeyTable, key_id_of
from app.store.database import StoreAway

REFRESH_S: Final = 2.0
"""How often the keys are read, and so how long a revoked one goes on working."""
SOONEST_S: Final = 0.25
"""How often they are read at most, however many unknown keys come."""

_log = logging.getLogger(__name__)


class Keys(Protocol):
    """Where keys are read from: ``app.store.keys.KeyStore``."""

    def table(self) -> KeyTable:
        """Return the keys that work now; may block, and raises ``StoreAway``."""


class KeyRing:
    """The keys that work, for one ingress and its event loop."""

    def __init__(self, store: Keys) -> None:
        self._store = store
        self._table = KeyTable({})
        self._away = False
        self._read_at = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to read the keys."""
        self._refreshing = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        """Read them no more."""
        tasks = [task for task in (self._refreshing, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def find(self, text: str) -> ApiKey | None:
        """Return the key that a client has sent, or ``None`` if it does not work.

        For a key that is not known the store is asked first, since it may be new.
        """
        key = self._table.find(text)
        if key is not None or (key_id := key_id_of(text)) is None:
            return key
        for _ in range(2):
            if key_id in self._table.by_id:
                break
            # The first may be a reading that began before the key was made.
            await self._read_again()
        return self._table.find(text)

    async def _read_again(self) -> None:
        """Read the keys soon, or with others who wait for the same."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        # One that gives up waiting must not end it for the others.
        await asyncio.shield(self._reading)

    async def _refresh(self) -> None:
        while True:
            await self._read_again()
            await asyncio.sleep(REFRESH_S)

    async def _read(self) -> None:
        await asyncio.sleep(max(0.0, self._read_at + SOONEST_S - time.monotonic()))
        try:
            self._table = await asyncio.to_thread(self._store.table)
            self._away = False
        except (StoreAway, ValueError) as error:
            # A value that this version does not know must not end the reading either.
            if not self._away:
                _log.error("keys cannot be read, those known go on working: %s", error)
            self._away = True
        self._read_at = time.monotonic()
