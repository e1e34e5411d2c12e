import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.process import logs

pytestmark = pytest.mark.unit


@settings(deadline=None)  # of the disk's speed nothing is claimed
@given(st.binary(max_size=300), st.integers(0, 5))
def test_tail_never_fails_nor_gives_more_than_asked(content: bytes, lines: int) -> None:
    path = Path(f"/dev/shm/{uuid.uuid4().hex}")
    try:
        path.write_bytes(content)
        assert logs.tail(path, lines).count("\n") <= max(lines - 1, 0)
    finally:
        path.unlink()


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=30), st.integers(50, 400))
def test_a_log_keeps_its_end_and_a_bounded_size(sizes: list[int], limit: int) -> None:
    """However much an engine writes, through the descriptor that it has had from the start."""
    folder = Path(f"/dev/shm/{uuid.uuid4().hex}")
    path, log = logs.open_log(folder, "engine", 3)
    written = b""
    try:
        for number, size in enumerate(sizes):
            line = f"{number}:".encode() + b"x" * size + b"\n"
            os.write(log, line)
            written += line
            turned = logs.rotate(path, limit)
            assert path.stat().st_size < limit and (not turned or path.stat().st_size == 0)
            older = path.with_name(path.name + logs.OLDER)
            kept = (older.read_bytes() if older.exists() else b"") + path.read_bytes()
            assert written.endswith(kept) and len(kept) <= 2 * limit + 210
            assert logs.tail(path, 1).startswith(f"{number}:")
            assert not turned or older.stat().st_mode & 0o777 == 0o600
    finally:
        os.close(log)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_an_old_log_goes_with_its_older_part(tmp_path: Path) -> None:
    for _ in range(3):
        path, log = logs.open_log(tmp_path, "engine", 1)
        os.write(log, b"0123456789")
        os.close(log)
        assert logs.rotate(path, 10)
    path, log = logs.open_log(tmp_path, "engine", 1)
    os.close(log)
    assert set(tmp_path.iterdir()) == {path}


def test_a_log_that_cannot_be_moved_is_left_as_it_is(tmp_path: Path) -> None:
    path, log = logs.open_log(tmp_path, "engine", 1)
    os.write(log, b"0123456789")
    os.close(log)
    path.with_name(path.name + logs.OLDER).mkdir()
    with pytest.raises(OSError):
        logs.rotate(path, 10)
    assert path.read_bytes() == b"0123456789"
    assert not list(tmp_path.glob("*.new"))
