"""Notes in Ray's key-value store; tests/integration/test_failed_start.py has those in Ray's own."""

import pytest

from app.ray_compat import notes
from tests.support.cluster import eventually

pytestmark = pytest.mark.unit


class Store:
    """The calls of Ray's client of its store. The first write is not answered."""

    def __init__(self):
        self.notes, self.failures = {}, 1

    def internal_kv_keys(self, prefix, namespace, timeout):
        # One that is removed before it is read.
        return [*(name for name in self.notes if name.startswith(prefix)), prefix + b"gone"]

    def internal_kv_multi_get(self, names, namespace, timeout):
        return {name: self.notes[name] for name in names if name in self.notes}

    def internal_kv_put(self, name, note, overwrite, namespace, timeout):
        if self.failures:
            self.failures -= 1
            raise TimeoutError
        assert overwrite
        self.notes[name] = note

    def internal_kv_del(self, name, by_prefix, namespace, timeout):
        assert not by_prefix
        self.notes.pop(name, None)


@pytest.fixture
def store(monkeypatch):
    made = Store()
    # private: the client of Ray's head, which a test has not.
    monkeypatch.setattr(notes, "_client", lambda: made)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    return made


def test_notes_are_written_until_that_succeeds_read_by_prefix_and_removed(store):
    for name in ("start/m/a", "start/m/b", "start/n/a"):
        notes.post(name, name.encode())
    eventually(lambda: len(store.notes) == 3)
    assert notes.read_notes("start/m/") == {"start/m/a": b"start/m/a", "start/m/b": b"start/m/b"}
    notes.post("start/m/a", None)
    notes.post("start/m/never", None)
    notes.post("start/m/c", b"after")
    eventually(lambda: b"start/m/c" in store.notes)
    assert set(notes.read_notes("start/m/")) == {"start/m/b", "start/m/c"}
    assert notes.read_notes("start/x/") == {}
