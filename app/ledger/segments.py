"""The files of a journal: one folder an ingress, one file a segment.

    <folder>/<name of the journal>/lock               held by the ingress for as long as it lives
    <folder>/<name of the journal>/00000001.journal   its segments, in order

The lock is the kernel's (``flock``): it goes with its process, however that dies, so whoever gets
a journal's lock knows that its ingress is dead.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOCK: Final = "lock"
_SUFFIX: Final = ".journal"
_ZEROS: Final = bytes(256 * 1024)
# Not a journal's name: nobody may adopt a journal between its making and its locking.
_UNBORN: Final = ".new-"
DAMAGED: Final = ".damaged"
"""Ending of a journal's name that held bytes whose checksum is wrong: kept for a person."""
_OWN: Final = ".own"
UNREAD: Final = ".unread"
"""Ending of a journal's name that held entries of a newer version, or none that make sense."""


class SegmentFile:
    """One segment, open for writing. Its space on the disk is taken when it is made.

    Attributes:
        number: its place in the journal, counted from 1.
        size: how many bytes are written.
    """

    def __init__(self, journal: Path, number: int, allocated: int) -> None:
        self.number = number
        self.size = 0
        self._unsynced = bytearray()
        self._written_again = True
        self._path = segment_path(journal, number)
        self._allocated = allocated
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.posix_fallocate(self._file, 0, allocated)
            self._fill_with_zeros()
            os.fsync(self._file)
            sync_folder(journal)
        except BaseException:
            self.discard()
            raise

    @property
    def left(self) -> int:
        """How many bytes its space still takes."""
        return max(self._allocated - self.size, 0)

    def write(self, data: bytes) -> None:
        """Write after what is there; what a failure leaves half-written is written over."""
        self._write_at(self.size, data)
        self.size += len(data)
        self._unsynced += data

    def sync(self) -> None:
        """Return when all that was written survives a loss of power.

        What a failed sync leaves on the disk is anybody's guess, and the kernel holds it for
        written: so it is written once more before the next.
        """
        if not self._written_again:
            # A copy: what a failed write still refers to could not grow any more.
            self._write_at(self.size - len(self._unsynced), bytes(self._unsynced))
        self._written_again = False
        os.fdatasync(self._file)
        self._written_again = True
        self._unsynced.clear()

    @property
    def unsynced(self) -> int:
        """How many bytes have been written since the last sync."""
        return len(self._unsynced)

    def _write_at(self, place: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._file, rest, place)
            place, rest = place + done, rest[done:]

    def _fill_with_zeros(self) -> None:
        # Space that was taken and never written is marked so in the file system, and the first
        # write to it changes that mark: each sync would then wait for the file system's own
        # journal, and for whatever others on this disk have in it.
        for place in range(0, self._allocated, len(_ZEROS)):
            self._write_at(place, _ZEROS[: self._allocated - place])

    def close(self) -> None:
        """Write no more to it."""
        os.close(self._file)

    def discard(self) -> None:
        """Close and remove it."""
        self.close()
        with suppress(FileNotFoundError):
            self._path.unlink()


def segment_path(journal: Path, number: int) -> Path:
    """Return where a segment lies."""
    return journal / f"{number:08d}{_SUFFIX}"


def segment_numbers(journal: Path) -> list[int]:
    """Return the numbers of the segments that there are, in order."""
    return sorted(int(path.stem) for path in journal.glob(f"*{_SUFFIX}"))


def sync_folder(folder: Path) -> None:
    """Return when the folder's list of files survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bytes_taken(folder: Path) -> int:
    """Return how much of the disk all journals of a folder take, those set aside left out."""
    taken = 0
    for path in folder.glob(f"*/*{_SUFFIX}"):
        if path.parent.name.endswith((DAMAGED, UNREAD)):
            continue
        with suppress(FileNotFoundError):
            taken += path.stat().st_blocks * 512
    return taken


def create_journal(folder: Path) -> tuple[Path, int]:
    """Make a new journal's folder, and return it with the handle that holds its lock."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = uuid.uuid4().hex
    unborn = folder / f"{_UNBORN}{name}"
    unborn.mkdir(mode=0o700)
    handle = _open_lock(unborn)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    journal = unborn.rename(folder / name)
    sync_folder(folder)
    return journal, handle


def remove_journal(journal: Path) -> None:
    """Remove a journal whose lock the caller holds, and whose records are all in the store."""
    for number in segment_numbers(journal):
        segment_path(journal, number).unlink()
    (journal / _LOCK).unlink()
    # Another may have found it without a lock meanwhile.
    with suppress(FileNotFoundError):
        journal.rmdir()


def keep_segment(journal: Path, number: int) -> Path:
    """Keep a segment of a living journal for a person, and return the folder.

    The file there is the same one, so it has what is written to it later, too, and outlives its
    journal.
    """
    kept = journal.with_name(f"{journal.name}{_OWN}{DAMAGED}")
    kept.mkdir(mode=0o700, exist_ok=True)
    with suppress(FileExistsError):
        segment_path(kept, number).hardlink_to(segment_path(journal, number))
    sync_folder(kept)
    sync_folder(kept.parent)
    return kept


def count_kept(folder: Path) -> int:
    """Return how many journals of a folder are set aside, for a person or a newer version."""
    return sum(path.name.endswith((DAMAGED, UNREAD)) for path in folder.glob("*"))


def lock_dead(journal: Path) -> int | None:
    """Return the handle that holds the lock of a dead ingress's journal, or ``None`` if it lives.

    Raises:
        OSError: that cannot be found out.
    """
    try:
        handle = os.open(journal / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # Who removed it was killed before its last step: all else was gone by then.
        with suppress(OSError):
            journal.rmdir()
        return None
    except NotADirectoryError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another may have adopted and removed it in between.
        os.stat(journal / _LOCK)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open_lock(journal: Path) -> int:
    return os.open(journal / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
