"""`scripts/run`, from its start to the death of Ray below it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.cluster import eventually, ingress_app, simulated_app
from tests.support.environment import apart

pytestmark = pytest.mark.faults

REPO = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config file of a model that is there at once."""
    monkeypatch.setenv("FRONTLINE_TEST_LEDGER", str(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    applications = [ingress_app(auth="keys"), simulated_app("one")]
    http_options = {"host": "127.0.0.1", "port": port}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "proxy_location": "HeadOnly",
                "http_options": http_options,
                "applications": applications,
            }
        )
    )
    return path


@contextmanager
def running(config):
    """Start what scripts/run ends in; yield the process and its output, by line."""
    started = subprocess.Popen(
        [sys.executable, REPO / "scripts/serve.py", config],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Its cluster stands beside the one that other tests of this process have.
        env=os.environ | apart() | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    output, lines = started.stdout, []
    assert output is not None
    reader = threading.Thread(target=lambda: lines.extend(output))
    reader.start()
    try:
        yield started, lines
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGINT)
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.send_signal(signal.SIGINT)
                started.wait(30)
        reader.join()
        output.close()


def said(lines, pattern):
    return re.search(pattern, "".join(lines))


def becomes_ready(started, lines):
    """Wait until it says so; false if Ray itself did not start.

    A raylet waits 15 s for its agents and ends then, which a busy machine may take. On such a one
    Ray alone has taken a minute to start.
    """

    def ready():
        return said(lines, r"Ready after \d+ s: test/one")

    try:
        eventually(lambda: ready() or started.poll() is not None, 300)
    except AssertionError:
        pytest.fail("".join(lines))
    if not ready():
        assert said(lines, "Ray's raylet has died"), "".join(lines)
    return ready()


def name_of(process):
    """Return its name, or nothing: a child of a running Ray may end at any moment."""
    with suppress(psutil.NoSuchProcess):
        return process.name()


@pytest.mark.timeout(900)
def test_it_says_ready_where_keys_are_asked_for_and_ends_when_the_raylet_dies(config):
    for _ in range(3):
        with running(config) as (started, lines):
            if not becomes_ready(started, lines):
                continue
            assert said(lines, "Clients need an API key") and said(lines, "Bearer .KEY")
            family = psutil.Process(started.pid).children(recursive=True)
            raylet = next(one for one in family if name_of(one) == "raylet")
            raylet.kill()
            assert started.wait(40) == 1
            eventually(lambda: said(lines, "Ray's raylet has died"))
            eventually(lambda: said(lines, "everything has ended"))
            assert not [one for one in family if one.is_running()]
            return
    pytest.fail("Ray did not start")


@pytest.mark.timeout(600)
def test_it_says_why_an_engine_fails_to_start(config, tmp_path):
    """At d26830b it said 'waiting for test/one' for ever."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'x: error: unrecognized arguments: --speed' >&2\nexit 2\n")
    python.chmod(0o755)
    changed = yaml.safe_load(config.read_text())
    changed["applications"][1]["args"]["pools"][0]["python"] = str(python)
    config.write_text(yaml.safe_dump(changed))
    with running(config) as (started, lines):
        eventually(lambda: said(lines, "failed to start") or started.poll() is not None, 300)
        if said(lines, "Ray's raylet has died"):
            pytest.skip("Ray did not start on this machine")
        assert said(lines, r"test/one: the engine of pool 'simulated' .*: unrecognized arguments")
        assert said(lines, "what to do: correct `engine_args`")
        assert said(lines, r"its log is .*/test-one\.simulated-.*\.log")
        assert started.poll() is None, "other models go on"
