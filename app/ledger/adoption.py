"""Adoption: moves the journals of this node's dead ingresses to the store.

A failing journal delays neither other journals nor the living ingress's own. If a part of a journal
cannot be read, everything else is moved first. Then the whole journal is kept under another suffix:
``.unread`` if a newer version may be able to read it, ``.damaged`` if a checksum is wrong. Each
process that starts tries the unread ones once more, because it may be of that version.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from app import alarms
from app.ledger.codec import Frame, read_segment
from app.ledger.dead_letter import Records, add_or_set_aside
from app.ledger.leftovers import Leftovers
from app.ledger.segments import (
    DAMAGED,
    UNREAD,
    count_kept,
    lock_dead,
    remove_journal,
    segment_numbers,
    segment_path,
)
from app.store.database import StoreAway

BATCH: Final = 500
"""Records in one transaction: enough to make its cost small, few enough to end within
milliseconds."""
_AGAIN_S: Final = 60.0
"""The retry interval for a journal that could not be moved: reading it may be expensive."""

_log = logging.getLogger(__name__)


class Adopter:
    """Adopts the journals of one folder.

    Args:
        folder: the folder.
        store: where the records go.
        on_moved: is called with the number of records whenever some have been moved.

    Attributes:
        set_aside: how many journals with unreadable parts it has found.
        kept: how many such journals are in the folder now, from any process. An operator may remove
            them.
        failing: the errors of journals that could not be moved, by name. They stay and are retried.
    """

    def __init__(
        self, folder: Path, store: Records, on_moved: Callable[[int], None] = lambda _: None
    ) -> None:
        self.set_aside = 0
        self.kept = 0
        self.failing: dict[str, str] = {}
        self._folder = folder
        self._store = store
        self._on_moved = on_moved
        self._again_at: dict[str, float] = {}
        self._unread_too = True

    def adopt(self, now: float) -> int:
        """Move the journals of dead ingresses to the store; return the number of records.

        Open streams are settled as interrupted.

        Args:
            now: the time by the monotonic clock, in seconds.

        Raises:
            StoreAway: the store is away; the rest has to wait.
        """
        moved = 0
        for journal in self._journals(now):
            try:
                moved += self._adopt_if_dead(journal)
            except StoreAway:
                raise
            except Exception as error:
                self._note_failure(journal.name, error, now)
            else:
                self._note_success(journal.name)
        self._unread_too = False
        self.kept = count_kept(self._folder)
        return moved

    def _journals(self, now: float) -> Iterator[Path]:
        journals = sorted(self._folder.glob("*"))
        # Another process or an operator may have moved them.
        for name in self.failing.keys() - {journal.name for journal in journals}:
            self._note_success(name)
        for journal in journals:
            name = journal.name
            if name.startswith(".") or name.endswith(DAMAGED):
                continue
            if name.endswith(UNREAD) and not self._unread_too:
                continue
            if now >= self._again_at.get(name, now):
                yield journal

    def _note_failure(self, name: str, error: Exception, now: float) -> None:
        self._again_at[name] = now + _AGAIN_S
        why = f"{type(error).__name__}: {error}"
        if self.failing.get(name) != why:
            text = f"journal {name} cannot be moved to the store, it stays"
            alarms.PROCESS.raised("journal not moved", text, error)
        self.failing[name] = why

    def _note_success(self, name: str) -> None:
        self.failing.pop(name, None)
        self._again_at.pop(name, None)

    def _adopt_if_dead(self, journal: Path) -> int:
        handle = lock_dead(journal)
        if handle is None:
            return 0
        try:
            return self._adopt(journal)
        finally:
            os.close(handle)

    def _adopt(self, journal: Path) -> int:
        damaged: list[int] = []
        left, moved = Leftovers(), 0
        bodies = left.settled(_frames(journal, damaged))
        while batch := list(islice(bodies, BATCH)):
            add_or_set_aside(self._store, batch, journal.parent)
            moved += len(batch)
            self._on_moved(len(batch))
        if left.unread:
            self._keep(journal, UNREAD, f"{len(left.unread)} entries, first: {left.unread[0]}")
        elif damaged:
            self._keep(journal, DAMAGED, f"segments {damaged}")
        else:
            remove_journal(journal)
        _log.warning("settled what a dead ingress left: %d records of %s", moved, journal.name)
        return moved

    def _keep(self, journal: Path, ending: str, what: str) -> None:
        self.set_aside += 1
        kept = journal.rename(journal.with_name(journal.name.removesuffix(UNREAD) + ending))
        alarms.PROCESS.raised(
            "journal set aside",
            f"not all of journal {journal.name} can be read ({what}); it is kept as {kept}",
        )


def _frames(journal: Path, damaged: list[int]) -> Iterator[Frame]:
    for number in segment_numbers(journal):
        segment = read_segment(segment_path(journal, number).read_bytes())
        if segment.damaged:
            damaged.append(number)
        yield from segment.frames
