"""Records that the database permanently rejects: kept in files next to the journals.

    <folder>/refused/<request id>.json   {"why": …, "record": {…}}

Such a record must not block the records behind it. It is not dropped either, because it is part of
a bill; an operator has to handle it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

import orjson

from app import alarms
from app.ledger.segments import sync_folder
from app.store.database import StoreRefuses

_FOLDER: Final = "refused"


class Records(Protocol):
    """The store of records: ``app.ledger.record_store.RecordStore``."""

    def prepare(self) -> bool:
        """Migrate the tables if needed; return whether this may be another store than before.

        Raises ``StoreAway``.
        """

    def add(self, bodies: Sequence[bytes]) -> None:
        """Write settled records in one transaction; raises ``StoreAway``, or ``StoreRefuses``."""


def add_or_set_aside(store: Records, bodies: Sequence[bytes], folder: Path) -> None:
    """Write settled records to the store; set aside those that it permanently rejects.

    Args:
        store: the store.
        bodies: the records as JSON.
        folder: the folder of the journals, where rejected records are kept.

    Raises:
        StoreAway: the store cannot be used now.
        OSError: a rejected record cannot be stored in its file.
    """
    try:
        store.add(bodies)
    except StoreRefuses as refusal:
        if len(bodies) == 1:
            _set_aside(folder, bodies[0], str(refusal))
            return
        # The database does not report which record it is, so halve the batch.
        middle = len(bodies) // 2
        add_or_set_aside(store, bodies[:middle], folder)
        add_or_set_aside(store, bodies[middle:], folder)


def _set_aside(folder: Path, body: bytes, why: str) -> None:
    request_id = orjson.loads(body)["request_id"]
    kept = folder / _FOLDER / f"{quote(request_id, safe='')}.json"
    if kept.exists():
        return
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    unborn = kept.with_suffix(f".{os.getpid()}")
    with unborn.open("wb") as file:
        file.write(b'{"why":%b,"record":%b}' % (orjson.dumps(why), body))
        file.flush()
        os.fsync(file.fileno())
    unborn.rename(kept)
    sync_folder(kept.parent)
    sync_folder(folder)
    alarms.PROCESS.raised(
        "record refused",
        f"the database refuses the record of {request_id} for good: {why}; kept in {kept}",
    )


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record that was set aside.

    Attributes:
        path: its file.
        why: the database's error.
        body: the record as JSON.
    """

    path: Path
    why: str
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """The record's fields, with JSON types."""
        fields: dict[str, Any] = orjson.loads(self.body)
        return fields


def refused_records(folder: Path) -> Iterator[RefusedRecord]:
    """Yield the records that were set aside on this node, by file name."""
    for path in sorted((folder / _FOLDER).glob("*.json")):
        kept = orjson.loads(path.read_bytes())
        yield RefusedRecord(path, kept["why"], orjson.dumps(kept["record"]))


def retry_refused(store: Records, folder: Path) -> int:
    """Retry all rejected records; return how many the store has accepted. The others stay.

    Raises:
        StoreAway: the store cannot be used now.
    """
    written = 0
    for refused in refused_records(folder):
        try:
            store.add([refused.body])
        except StoreRefuses:
            continue
        refused.path.unlink()
        written += 1
    return written
