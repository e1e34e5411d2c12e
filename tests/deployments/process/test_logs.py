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
