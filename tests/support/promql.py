"""The series that PromQL asks for, and Prometheus itself, from `scripts/setup prometheus`."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.waiting import PATIENCE_S

MISSING = "Prometheus is not set up: scripts/setup prometheus"
_SELECTOR = re.compile(r"\b((?:ray|model_tier)[a-zA-Z0-9_:]+)(\{[^}]*\})?")


def tool(name: str) -> Path:
    """Return `prometheus` or `promtool`; skip the test where there is none."""
    path = Path(os.environ["FRONTLINE_HOME"]) / "tools/prometheus/usr/bin" / name
    if not path.exists():
        pytest.skip(MISSING)
    return path


def selectors(expr: str) -> list[str]:
    """Return the vector selectors of an expression, with Grafana's variables filled in."""
    filled = expr.replace("$model", ".*")
    return [name + (labels or "") for name, labels in _SELECTOR.findall(filled)]


def names(expr: str) -> set[str]:
    """Return the names of the series that an expression asks for."""
    return {name for name, _ in _SELECTOR.findall(expr)}


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expr: str) -> list[dict]:
        """Return the series of an expression now."""
        answer = self._client.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    def firing(self) -> dict[str, dict[str, str]]:
        """Return the labels of the alerts that fire, by name."""
        alerts = self._client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {a["labels"]["alertname"]: a["labels"] for a in alerts if a["state"] == "firing"}

    def fired(self, within_s: float) -> dict[str, dict[str, str]]:
        """Return the labels of the alerts that fired within the last seconds, by name."""
        history = f'last_over_time(ALERTS{{alertstate="firing"}}[{math.ceil(within_s)}s])'
        return {one["metric"]["alertname"]: one["metric"] for one in self.query(history)}

    def close(self) -> None:
        """Close the client."""
        self._client.close()


@contextmanager
def running(config: Path) -> Iterator[Prometheus]:
    """Run Prometheus on a free port of loopback, with its data beside its config file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(tool("prometheus")),
        f"--config.file={config}",
        f"--storage.tsdb.path={config.parent / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 30
        while not prometheus.ready():
            text = (config.parent / "log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait()
