"""Reads and changes keys for requests of admin keys.

It has one thread of its own, so that it delays neither the reading of keys nor the flusher. Every
change is logged when it is in the database, also if the client has left meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Final, TypeVar

from app.core import errors
from app.ledger.record import now_utc
from app.tenants.key_fields import changed_key, new_key
from app.tenants.key_rights import beyond
from app.tenants.key_store import KeyStore
from app.tenants.keys import ApiKey

MOST: Final = 8
"""How many reads and changes may wait or run in one ingress. Each takes milliseconds."""
_LONGEST_LINE: Final = 1000
"""How much of a change is logged, in characters: a key may name a hundred models."""
_T = TypeVar("_T")
_log = logging.getLogger("ray.serve")


class KeyAdmin:
    """The keys of a store, for admin keys. Belongs to an event loop.

    Every method raises ``KeysBusy`` if too many wait already, and ``StoreAway`` if the database
    cannot be used.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "keys")
        # Guards `_running`: work ends on the other thread.
        self._lock = Lock()
        self._running = 0

    def use(self, store: KeyStore) -> None:
        """Use another store from now on."""
        self._store = store

    def close(self) -> None:
        """Wait for what runs. May block."""
        self._thread.shutdown()

    async def listing(self) -> tuple[list[ApiKey], dict[str, str]]:
        """Return all keys, revoked ones too, oldest first, and the error of each invalid row."""
        return await self._run(self._store.listing)

    async def get(self, key_id: str) -> ApiKey | None:
        """Return the key with an id, or ``None`` if there is none or its row is invalid."""
        store = self._store
        return await self._run(lambda: store.get(key_id))

    async def create(self, admin: ApiKey, fields: Mapping[str, Any]) -> tuple[ApiKey, str]:
        """Create a key, and return it and the text that its owner sends.

        Raises:
            KeyFieldError: a field is wrong.
            BeyondOwnRights: the key would have more rights than the admin key.
        """
        key, text = new_key(fields, now_utc())
        _require_rights(key, admin)
        store = self._store

        def add() -> None:
            store.add(key)
            _note(admin, "created", key, fields)

        await self._run(add)
        return key, text

    async def change(self, admin: ApiKey, key_id: str, fields: Mapping[str, Any]) -> ApiKey | None:
        """Change a working key, and return it; ``None`` if there is none with this id.

        Raises:
            KeyFieldError: a field is wrong.
            BeyondOwnRights: the key would have more rights than the admin key.
        """
        store = self._store

        def changed(key: ApiKey) -> ApiKey:
            new = changed_key(key, fields)
            _require_rights(new, admin)
            return new

        def change() -> ApiKey | None:
            key = store.change(key_id, changed)
            if key is not None:
                _note(admin, "changed", key, fields)
            return key

        return await self._run(change)

    async def revoke(self, admin: ApiKey, key_id: str) -> bool:
        """Revoke a key; return whether there was a working key with this id."""
        store = self._store

        def revoke() -> bool:
            done = store.revoke(key_id, now_utc())
            if done:
                _log.info("API key %s revoked by admin key %s", key_id, admin.key_id)
            return done

        return await self._run(revoke)

    async def _run(self, work: Callable[[], _T]) -> _T:
        with self._lock:
            if self._running >= MOST:
                raise errors.KeysBusy
            self._running += 1
        # It goes on if the client leaves, and counts until it has ended.
        running = self._thread.submit(work)
        running.add_done_callback(lambda _: self._leave())
        return await asyncio.wrap_future(running)

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1


def _require_rights(key: ApiKey, admin: ApiKey) -> None:
    field = beyond(key, admin)
    if field is not None:
        raise errors.BeyondOwnRights(field)


def _note(admin: ApiKey, done: str, key: ApiKey, fields: Mapping[str, Any]) -> None:
    """Log a change. Fields hold no secret: the key's text is made here, and given by nobody."""
    what = repr(dict(fields))[:_LONGEST_LINE]
    _log.info(
        "API key %s of tenant %s %s by admin key %s: %s",
        key.key_id, key.tenant, done, admin.key_id, what,
    )  # fmt: skip
