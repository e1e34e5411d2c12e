"""`scripts/run`, from its start to the death of Ray below it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.cluster import eventually, ingress_app, simulated_app
from tests.support.environment import apart

pytestmark = pytest.mark.faults

REPO = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Start what scripts/run ends in, on a model that is there at once; its output, by line."""
    monkeypatch.setenv("FRONTLINE_TEST_LEDGER", str(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [ingress_app(auth="keys"), simulated_app("one")],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    started = subprocess.Popen(
        [sys.executable, REPO / "scripts/serve.py", path],
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


@pytest.mark.timeout(240)
def test_it_says_ready_where_keys_are_asked_for_and_ends_when_the_raylet_dies(run):
    started, lines = run

    def said(pattern):
        return re.search(pattern, "".join(lines))

    def ready():
        assert started.poll() is None, "".join(lines)
        return said(r"Ready after \d+ s: test/one")

    try:
        eventually(ready, 150)
    except AssertionError:
        pytest.fail("".join(lines))
    assert said("Clients need an API key") and said("Bearer .KEY")
    family = [started, *psutil.Process(started.pid).children(recursive=True)]
    raylet = next(one for one in family[1:] if one.name() == "raylet")
    raylet.kill()
    assert started.wait(40) == 1
    eventually(lambda: said("Ray's raylet has died") and said("everything has ended"))
    assert not [one for one in family[1:] if one.is_running()]
