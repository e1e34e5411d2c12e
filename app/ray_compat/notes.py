"""Short notes in Ray's key-value store, from one process of the cluster to others.

The store is Ray's own (GCS). It has no public interface; Serve keeps its checkpoints there too.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import ray

from app import supervision

_NAMESPACE: Final = b"frontline"
_TIMEOUT_S: Final = 2.0


def read_notes(prefix: str) -> dict[str, bytes]:
    """Return the notes whose names begin with ``prefix``, by name. Blocks for Ray's head.

    Raises:
        RayError: Ray's head does not answer.
    """
    client = _client()
    names = client.internal_kv_keys(prefix.encode(), namespace=_NAMESPACE, timeout=_TIMEOUT_S)
    if not names:
        return {}
    # A note that has just been removed is not among them.
    notes = client.internal_kv_multi_get(names, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
    return {name.decode(): note for name, note in sorted(notes.items())}


def read_note(name: str) -> bytes | None:
    """Return a note; ``None`` if there is none. Blocks for a question to Ray's head.

    Raises:
        RayError: Ray's head does not answer.
    """
    note: bytes | None = _client().internal_kv_get(
        name.encode(), namespace=_NAMESPACE, timeout=_TIMEOUT_S
    )
    return note


def write_note(name: str, note: bytes | None) -> None:
    """Write a note over the one with the same name; ``None`` removes it. Blocks for Ray's head.

    Raises:
        RayError: Ray's head does not answer.
    """
    client, key = _client(), name.encode()
    if note is None:
        client.internal_kv_del(key, False, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
    else:
        client.internal_kv_put(key, note, True, namespace=_NAMESPACE, timeout=_TIMEOUT_S)


def post(name: str, note: bytes | None) -> None:
    """Write a note from a thread, again and again until that succeeds; does not wait for it.

    ``None`` removes the note. Of notes with the same name only the latest is written. Without Ray
    there is nobody to read it.
    """
    if ray.is_initialized():
        _POST.leave(name, note)


def _client() -> Any:
    return ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]


class _Post:
    """The notes that are still to be written, and the thread that writes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: dict[str, bytes | None] = {}
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def leave(self, name: str, note: bytes | None) -> None:
        with self._lock:
            self._notes[name] = note
            if self._thread is None:
                self._thread = supervision.keep_thread("notes", self._write)
        self._left.set()

    def _write(self) -> None:
        while True:
            with self._lock:
                notes = dict(self._notes)
            for name, note in notes.items():
                write_note(name, note)
                self._written(name, note)
            self._left.wait()
            self._left.clear()

    def _written(self, name: str, note: bytes | None) -> None:
        with self._lock:
            if self._notes.get(name) is note:
                del self._notes[name]


_POST: Final = _Post()
