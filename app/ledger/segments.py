"""The files of a journal: one folder per ingress, one file per segment.

    <folder>/<name of the journal>/lock               held by the ingress for as long as it lives
    <folder>/<name of the journal>/00000001.journal   its segments, in order

The lock is the kernel's (``flock``). It is released when its process dies, for any reason. So a
process that gets a journal's lock knows that the journal's ingress is dead.
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
# Not a journal's name, so that no process adopts a journal before it is locked.
_UNBORN: Final = ".new-"
DAMAGED: Final = ".damaged"
"""Suffix of a journal that contains bytes with a wrong checksum: kept for an operator."""
_OWN: Final = ".own"
UNREAD: Final = ".unread"
"""Suffix of a journal that contains entries of a newer version, or invalid ones."""


class SegmentFile:
    """One segment, open for writing. Its disk space is allocated when it is created.

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
        """How many bytes are still free in its allocated space."""
        return max(self._allocated - self.size, 0)

    def write(self, data: bytes) -> None:
        """Append data. Bytes that a failed write has left are overwritten."""
        self._write_at(self.size, data)
        self.size += len(data)
        self._unsynced += data

    def sync(self) -> None:
        """Return when all written data survives a loss of power.

        After a failed sync the state of the disk is unknown, and the kernel considers the data
        written. So the data is written once more before the next sync.
        """
        if not self._written_again:
            # A copy, because a `bytearray` cannot grow while a failed write still refers to it.
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
        # The file system marks allocated space as unwritten, and the first write changes that mark.
        # Each sync would then wait for the file system's own journal, including the changes of
        # other processes on this disk.
        for place in range(0, self._allocated, len(_ZEROS)):
            self._write_at(place, _ZEROS[: self._allocated - place])

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def discard(self) -> None:
        """Close and remove the file."""
        self.close()
        with suppress(FileNotFoundError):
            self._path.unlink()


def segment_path(journal: Path, number: int) -> Path:
    """Return the path of a segment."""
    return journal / f"{number:08d}{_SUFFIX}"


def segment_numbers(journal: Path) -> list[int]:
    """Return the numbers of the existing segments, in order."""
    return sorted(int(path.stem) for path in journal.glob(f"*{_SUFFIX}"))


def sync_folder(folder: Path) -> None:
    """Return when the folder's list of files survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bytes_taken(folder: Path) -> int:
    """Return the disk space of all journals in a folder, in bytes, without those set aside."""
    taken = 0
    for path in folder.glob(f"*/*{_SUFFIX}"):
        if path.parent.name.endswith((DAMAGED, UNREAD)):
            continue
        with suppress(FileNotFoundError):
            taken += path.stat().st_blocks * 512
    return taken


def create_journal(folder: Path) -> tuple[Path, int]:
    """Create a new journal's folder; return it, and the handle that holds its lock."""
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
    # Another process may have found it without a lock and removed it.
    with suppress(FileNotFoundError):
        journal.rmdir()


def keep_segment(journal: Path, number: int) -> Path:
    """Keep a segment of a living journal for an operator; return the folder.

    It is a hard link, so it also gets later writes, and outlives the journal.
    """
    kept = journal.with_name(f"{journal.name}{_OWN}{DAMAGED}")
    kept.mkdir(mode=0o700, exist_ok=True)
    with suppress(FileExistsError):
        segment_path(kept, number).hardlink_to(segment_path(journal, number))
    sync_folder(kept)
    sync_folder(kept.parent)
    return kept


def count_kept(folder: Path) -> int:
    """Return how many journals of a folder are set aside for an operator or a newer version."""
    return sum(path.name.endswith((DAMAGED, UNREAD)) for path in folder.glob("*"))


def lock_dead(journal: Path) -> int | None:
    """Lock the journal of a dead ingress; return the handle, or ``None`` if the ingress lives.

    Raises:
        OSError: whether it lives cannot be determined.
    """
    try:
        handle = os.open(journal / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # A process that removed the journal was killed before its last step; only the folder is
        # left.
        with suppress(OSError):
            journal.rmdir()
        return None
    except NotADirectoryError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have adopted and removed it in between.
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
