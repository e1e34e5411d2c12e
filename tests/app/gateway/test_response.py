import re

import pytest

from app.gateway.response import new_request_id

pytestmark = pytest.mark.unit


def test_ids_differ_and_grow_with_time(monkeypatch):
    ids = [new_request_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("req_[0-9a-f]{32}", one) for one in ids)
    later = max(int(one[4:16], 16) for one in ids) + 1
    monkeypatch.setattr("app.gateway.response.time.time_ns", lambda: later * 1_000_000)
    assert new_request_id() > max(ids)
