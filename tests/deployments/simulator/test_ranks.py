"""Parts of one simulated engine, as processes."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest

from deployments.engines.base import Launch, NodeSpan
from deployments.engines.simulated import Simulated
from deployments.hosting.ports import reserve_port

pytestmark = pytest.mark.unit

KEYED = {"authorization": "Bearer secret"}
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
def parts():
    """The first part of an engine of three, the others, and a client of the first."""
    with reserve_port() as http, reserve_port() as meeting:
        span = NodeSpan(3, 0, http.host, http.host, meeting.port)
        launch = Launch("m", "m", http.host, http.port, 8, "secret", sys.executable, span=span)
        processes = [start(replace(launch, span=replace(span, rank=0)))]
        with httpx.Client(base_url=launch.base_url, headers=KEYED, timeout=1) as client:
            yield launch, processes, client
    for process in processes:
        process.kill()
        process.wait()


def start(launch):
    adapter = Simulated()
    environment = os.environ | adapter.environment(launch)
    return subprocess.Popen(adapter.command(launch), env=environment)


def ready(client):
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_is_ready_once_all_are_there_and_stands_still_without_one(parts):
    launch, processes, client = parts
    processes.append(start(replace(launch, span=replace(launch.span, rank=1))))
    time.sleep(1.5)
    assert not ready(client)
    processes.append(start(replace(launch, span=replace(launch.span, rank=2))))
    wait_for(lambda: ready(client))
    assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
    processes[2].kill()
    time.sleep(0.3)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=ASKED)
    assert ready(client), "it does not know"
    processes[0].kill()
    assert processes[1].wait(10) == 1
