"""The keys that an ingress knows: read from the store every two seconds, and kept while the store
is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, Protocol

from app import supervision
from app.store.database import StoreAway
from app.tenants.keys import ApiKey, KeyTable, key_id_of

REFRESH_S: Final = 2.0
"""How often the keys are read, and so how long a revoked key keeps working."""
SOONEST_S: Final = 0.25
"""The shortest interval between two reads, however many unknown keys arrive."""

_LOGGED: Final = 20
"""How many unreadable keys are named in the log per read; the others are only counted."""

_log = logging.getLogger("ray.serve")


class Keys(Protocol):
    """The source of keys: ``app.tenants.key_store.KeyStore``."""

    def table(self) -> KeyTable:
        """Return the keys that work now; may block, and raises ``StoreAway``."""


class KeyCache:
    """The working keys, for one ingress and its event loop.

    Attributes:
        read: whether the keys have been read at least once.
        away: whether the last read failed.
    """

    def __init__(self, store: Keys) -> None:
        self._store = store
        self._table = KeyTable({})
        self.read = False
        self.away = False
        self._read_at = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to read the keys."""
        self._refreshing = supervision.keep_running("key refresh", self._refresh)

    async def stop(self) -> None:
        """Stop reading the keys."""
        await supervision.stop(self._refreshing, self._reading)

    def read_from(self, store: Keys) -> None:
        """Read the keys from another store from now on. Known keys work until it has been read.

        A request that waits for a key waits for the new store.
        """
        self._store = store

    @property
    def unreadable(self) -> int:
        """How many rows were invalid at the last read; those keys do not work."""
        return len(self._table.unreadable)

    def known(self, text: str) -> ApiKey | None:
        """Return the key that a client has sent, without reading the store."""
        return self._table.find(text, datetime.now(UTC))

    def by_id(self, key_id: str) -> ApiKey | None:
        """Return a working key by its id, without reading the store."""
        return self._table.get(key_id, datetime.now(UTC))

    async def look_up(self, key_id: str) -> ApiKey | None:
        """Return a working key by its id; the store is read if there is none, as in ``find``."""
        await self._ensure(key_id)
        return self.by_id(key_id)

    async def find(self, text: str) -> ApiKey | None:
        """Return the key that a client has sent, or ``None`` if it does not work.

        For an unknown key the store is read first, because the key may be new.
        """
        key = self.known(text)
        if key is not None or (key_id := key_id_of(text)) is None:
            return key
        await self._ensure(key_id)
        return self.known(text)

    async def _ensure(self, key_id: str) -> None:
        """Read the store again unless there is a key with this id."""
        for _ in range(2):
            if key_id in self._table.by_id:
                break
            # Twice, because the first may join a read that began before the key was created.
            await self._read_again()

    async def _read_again(self) -> None:
        """Read the keys soon, or join a read that is under way."""
        if self._reading is None or self._reading.done():
            self._reading = supervision.run_once("key reading", self._read)
        # A caller that is cancelled must not cancel the read for the others.
        await asyncio.shield(self._reading)

    async def _refresh(self) -> None:
        while True:
            await self._read_again()
            await asyncio.sleep(REFRESH_S)

    async def _read(self) -> None:
        await asyncio.sleep(max(0.0, self._read_at + SOONEST_S - time.monotonic()))
        try:
            table = await self._read_table()
        except StoreAway as error:
            if not self.away:
                _log.error("keys cannot be read, those known go on working: %s", error)
            self.away = True
        except BaseException:
            # An error of our own, which the supervision of this task reports.
            self.away = True
            raise
        else:
            self._report(table.unreadable)
            self._table, self.read, self.away = table, True, False
        finally:
            self._read_at = time.monotonic()

    async def _read_table(self) -> KeyTable:
        """Return the keys of the store that is in force when the read ends."""
        while True:
            store = self._store
            try:
                table = await asyncio.to_thread(store.table)
            except Exception:
                if store is self._store:
                    raise
            else:
                if store is self._store:
                    return table

    def _report(self, unreadable: Mapping[str, str]) -> None:
        """Log invalid rows, once for each new error of a row."""
        new = {
            i: fault for i, fault in unreadable.items() if self._table.unreadable.get(i) != fault
        }
        for key_id, fault in list(new.items())[:_LOGGED]:
            _log.error("key %s cannot be read and does not work: %s", key_id, fault)
        if new:
            _log.error("%d keys in the store cannot be read", len(unreadable))
