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
    # It is replaced by what is tested, and restored afterwards.
    monkeypatch.setattr(logger, "info", logger.info)
    monkeypatch.setattr(logger, "level", logging.INFO)
    lines = []
    handler = logging.Handler()
    monkeypatch.setattr(
        handler, "emit", lambda record: lines.append(f"{record.funcName}: {record.getMessage()}")
    )
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_request_that_is_logged_already_has_no_second_line(written):
    leave_out_logged()
    logger = logging.getLogger("ray.serve")

    def request(*, logged):
        if logged:
            note_logged()
        logger.info("a %s", "request", extra=OF_A_REQUEST)
        logger.info("something else")

    copy_context().run(request, logged=True)
    assert written == ["request: something else"]
    # The note is of that request alone.
    copy_context().run(request, logged=False)
    assert written == ["request: something else", "request: a request", "request: something else"]
