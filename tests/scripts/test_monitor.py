"""`scripts/monitor` starts Prometheus, and Grafana where it is, and ends both."""

import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.support.promql import tool
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.unit

REPO = Path(__file__).parents[2]
# Stands in for Grafana, which no package registry has: it writes down how it was started.
GRAFANA = """#!/usr/bin/env python3
import json, os, signal, sys
names = ("FRONTLINE_", "GF_")
given = {name: value for name, value in os.environ.items() if name.startswith(names)}
with open(os.environ["SEEN"] + ".new", "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": given}, file)
os.rename(os.environ["SEEN"] + ".new", os.environ["SEEN"])
signal.pause()
"""


@contextmanager
def monitor(tmp_path, port, *path):
    """Run it with its data in a folder of its own; yield what it prints, line by line."""
    home = tmp_path / "home"
    (home / "tools").mkdir(parents=True)
    (home / "tools/prometheus").symlink_to(tool("prometheus").parents[2])
    # The set-up would make its own: a copy of the script calls one that does nothing.
    scripts = tmp_path / "clone/scripts"
    scripts.mkdir(parents=True)
    for name, text in (("setup", "#!/bin/sh\n"), ("activate", "")):
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)
    (scripts / "monitor").write_text((REPO / "scripts/monitor").read_text())
    (tmp_path / "clone/configs").symlink_to(REPO / "configs")
    environment = os.environ | {
        "FRONTLINE_HOME": str(home),
        "PATH": os.pathsep.join([*map(str, path), "/usr/bin", "/bin"]),
        "SEEN": str(tmp_path / "seen"),
    }
    command = ["bash", scripts / "monitor", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(SLOWEST * 20)
            left = psutil.wait_procs(children, SLOWEST * 20)[1]
            for one in left:
                one.kill()
            assert not left, "it leaves nothing behind"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition):
    deadline = time.monotonic() + SLOWEST * 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def home(monkeypatch):
    """Where Prometheus is, also in a plain virtual environment."""
    default = Path.home() / ".cache/frontline"
    monkeypatch.setenv("FRONTLINE_HOME", os.environ.get("FRONTLINE_HOME", str(default)))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("program", ["grafana", "grafana-server", None])
def test_it_starts_what_there_is_and_ends_it(tmp_path, program):
    port = free_port()
    (tmp_path / "bin").mkdir()
    if program:
        (tmp_path / "bin" / program).write_text(GRAFANA)
        (tmp_path / "bin" / program).chmod(0o755)
    with monitor(tmp_path, port, tmp_path / "bin") as process:
        wait_for(lambda: answers(port))
        rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert rules, "its rules are read"
        if program is None:
            lines = [process.stdout.readline() for _ in range(3)]
            assert any("Grafana:    not started" in line for line in lines)
            return
        seen = tmp_path / "seen"
        wait_for(seen.exists)
        given = json.loads(seen.read_text())
        check_grafana(given, program, port)


def check_grafana(given, program, port):
    """What it is told to load is there, and names this Prometheus."""
    subcommand = ["server"] if program == "grafana" else []
    assert given["arguments"] == [*subcommand, "--homepath=/usr/share/grafana"]
    told = given["environment"]
    assert told["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    folder = Path(told["GF_PATHS_PROVISIONING"])

    def provisioned(kind, entry):
        [file] = (folder / kind).iterdir()
        # As Grafana does with variables in these files.
        text = file.read_text()
        for name, value in told.items():
            text = text.replace(f"${{{name}}}", value)
        [one] = yaml.safe_load(text)[entry]
        return one

    source = provisioned("datasources", "datasources")
    assert source["url"] == f"http://127.0.0.1:{port}"
    dashboards = Path(provisioned("dashboards", "providers")["options"]["path"])
    made = json.loads((dashboards / "frontline.json").read_text())
    assert made["uid"] == "frontline"
