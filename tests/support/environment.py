"""The environment of tests that start a Ray cluster: that of ``scripts/activate``, and more."""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import NoReturn

import pytest

from tests.support.ports import claim_serve_ports

MISSING = "needs a cluster's environment: scripts/test, or `FRONTLINE_ENV=test . scripts/activate`"
"""Why tests with a cluster do not run in a plain virtual environment."""


def is_active() -> bool:
    """Whether ``scripts/activate`` was sourced."""
    return "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ


def skip(reason: str) -> NoReturn:
    """Skip a test for want of something; under ``scripts/test``, which runs them all, fail it."""
    if os.environ.get("FRONTLINE_TESTS") == "all":
        pytest.fail(reason)
    pytest.skip(reason)


def prepare() -> None:
    """Set what a cluster of tests needs. Ray reads it when it is imported: call it before."""
    # A test's cluster lives beside others on the machine: that of another pytest-xdist worker, or
    # one from scripts/run.
    os.environ |= {
        **apart(),
        # Nothing is worth waiting half a minute for when a test is over.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Serve's ten times a second take each cluster a tenth of a core, of two that tests have.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        # For this process alone (local_serve takes it out again): tests call handles from threads
        # without an event loop.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    }
    os.environ.pop("RAY_ADDRESS", None)


def apart() -> dict[str, str]:
    """Return settings that keep a cluster apart from others: its ports and its HAProxy's folder."""
    return _haproxy_folder() | claim_serve_ports()


def _haproxy_folder() -> dict[str, str]:
    """Return settings that give a cluster's HAProxy a folder of its own."""
    folder = Path(mkdtemp(prefix="fl-"))  # a Unix socket's path must be short
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shared = str(Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent)
    return {
        name: value.replace(shared, str(folder), 1)
        for name, value in os.environ.items()
        if name.startswith("RAY_SERVE_HAPROXY_") and value.startswith(shared)
    }
