"""The keys that an ingress knows: read from the store every so often, kept while it is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final, Protocol

from app import supervision
from app.store.database import StoreAway
from app.tenants.keys import ApiKey, KeyTable, key_id_of

REFRESH_S: Final = 2.0
"""How often the keys are read, and so how long a revoked one goes on working."""
SOONEST_S: Final = 0.25
"""How often they are read at most, however many unknown keys come."""

_LOGGED: Final = 20
"""Unreadable keys named in the log at one reading; the others are only counted."""

_log = logging.getLogger("ray.serve")


class Keys(Protocol):
    """Where keys are read from: ``app.tenants.key_store.KeyStore``."""

    def table(self) -> KeyTable:
        """Return the keys that work now; may block, and raises ``StoreAway``."""


class KeyCache:
    """The keys that work, for one ingress and its event loop.

    Attributes:
        read: whether they have been read at all.
        away: whether they could not be read the last time.
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
        """Begin to read the keys."""
        self._refreshing = supervision.keep_running("key refresh", self._refresh)

    async def stop(self) -> None:
        """Read them no more."""
        await supervision.stop(self._refreshing, self._reading)

    def read_from(self, store: Keys) -> None:
        """Read the keys from another store from now on; those known work until it has been read.

        Whoever waits for a key waits for the new store.
        """
        self._store = store

    @property
    def unreadable(self) -> int:
        """How many rows could not be read the last time; those keys do not work."""
        return len(self._table.unreadable)

    def known(self, text: str) -> ApiKey | None:
        """Return the key that a client has sent, as far as is known without asking the store."""
        return self._table.find(text)

    async def find(self, text: str) -> ApiKey | None:
        """Return the key that a client has sent, or ``None`` if it does not work.

        For a key that is not known the store is asked first, since it may be new.
        """
        key = self.known(text)
        if key is not None or (key_id := key_id_of(text)) is None:
            return key
        for _ in range(2):
            if key_id in self._table.by_id:
                break
            # The first may be a reading that began before the key was made.
            await self._read_again()
        return self.known(text)

    async def _read_again(self) -> None:
        """Read the keys soon, or with others who wait for the same."""
        if self._reading is None or self._reading.done():
            self._reading = supervision.run_once("key reading", self._read)
        # One that gives up waiting must not end it for the others.
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
            # A fault of ours, which is reported where this was started.
            self.away = True
            raise
        else:
            self._report(table.unreadable)
            self._table, self.read, self.away = table, True, False
        finally:
            self._read_at = time.monotonic()

    async def _read_table(self) -> KeyTable:
        """Return what the store holds that is in force at the end of the reading."""
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
        """Log rows that cannot be read, once for each thing that is wrong with them."""
        new = {
            i: fault for i, fault in unreadable.items() if self._table.unreadable.get(i) != fault
        }
        for key_id, fault in list(new.items())[:_LOGGED]:
            _log.error("key %s cannot be read and does not work: %s", key_id, fault)
        if new:
            _log.error("%d keys in the store cannot be read", len(unreadable))
