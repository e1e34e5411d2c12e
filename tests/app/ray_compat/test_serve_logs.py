"""What Serve leaves out of its log."""

import logging
from contextvars import copy_context

import pytest

from app.ray_compat.serve_logs import leave_out_logged, note_logged

pytestmark = pytest.mark.unit

OF_A_REQUEST = {"serve_access_log": True}


@pytest.fixture
def written(monkeypatch):
    """The lines of Serve's log."""
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "level", logging.INFO)
    lines = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_request_that_is_logged_already_has_no_second_line(written):
    log = logging.getLogger("ray.serve").info
    leave_out_logged()

    def request(*, logged):
        if logged:
            note_logged()
        log("a request", extra=OF_A_REQUEST)
        log("something else")

    copy_context().run(request, logged=True)
    assert written == ["something else"]
    # The note is of that request alone.
    copy_context().run(request, logged=False)
    assert written == ["something else", "a request", "something else"]
