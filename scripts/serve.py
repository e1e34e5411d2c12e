"""`serve run CONFIG`, contained, with word of when its models are ready. Called by scripts/run."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from contain import Containment

MODEL = "deployments.model:build"
GRACE_S = 60.0
POLL_S = 1.0
REPEAT_S = 15.0
HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
EXAMPLE = """\
curl {url}/chat/completions -H 'content-type: application/json' -d '{{
  "model": "{model}", "service_tier": "priority",
  "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'"""


def log_folder(driver: int) -> Path:
    """Ray names a session after the process that started it; `session_latest` may be another's."""
    sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    return next(sessions.glob(f"session_*_{driver}/logs"), sessions / "session_latest/logs")


class Readiness:
    """Asks the ingress for its models until each of them serves some tier."""

    def __init__(self, models: list[str], port: int, driver: int) -> None:
        self._models = models
        self._driver = driver
        self._url = f"http://127.0.0.1:{port}/v1"
        self._started = time.monotonic()
        self._next_poll = 0.0
        self._last_said = (0.0, "")
        self.reached = False

    def look(self) -> None:
        now = time.monotonic()
        if self.reached or now < self._next_poll:
            return
        serving = self._serving()
        if serving is None:
            self._say("the ingress is starting")
        elif waiting := [model for model in self._models if model not in serving]:
            self._say(f"waiting for {', '.join(waiting)}")
        else:
            self.reached = True
            self._announce()
        self._next_poll = time.monotonic() + POLL_S

    def _serving(self) -> list[str] | None:
        """The models that answer; None while the ingress itself does not."""
        try:
            with urllib.request.urlopen(f"{self._url}/models", timeout=2.0) as answer:
                entries = json.load(answer)["data"]
        except (OSError, ValueError, KeyError):
            return None
        return [entry["id"] for entry in entries if entry.get("service_tiers")]

    def _say(self, what: str) -> None:
        now = time.monotonic()
        said_at, said = self._last_said
        if what == said and now - said_at < REPEAT_S:
            return
        where = f"; logs: {log_folder(self._driver)}" if what == said else ""
        print(f"run [{now - self._started:4.0f}s] {what}{where}", flush=True)
        self._last_said = (now, what)

    def _announce(self) -> None:
        elapsed = time.monotonic() - self._started
        lines = [
            "",
            f"Ready after {elapsed:.0f} s: {', '.join(self._models) or 'no models'}",
            f"Base URL for OpenAI clients: {self._url}/openai",
            f"Logs: {log_folder(self._driver)}",
            "",
        ]
        if self._models:
            lines += [EXAMPLE.format(url=self._url, model=self._models[0]), ""]
        print("\n".join([*lines, "Ctrl-C ends it."]), flush=True)


def model_ids(config: dict[str, Any]) -> list[str]:
    applications = config.get("applications") or []
    return [app["args"]["id"] for app in applications if app.get("import_path") == MODEL]


def require_free(port: int, remedy: str) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            sys.exit(f"run: port {port} is in use: end what listens there, or set {remedy}")


def main() -> None:
    path = sys.argv[1]
    config = yaml.safe_load(Path(path).read_text())
    port = (config.get("http_options") or {}).get("port", 8000)
    require_free(port, f"http_options.port in {path}")
    for name, default in HAPROXY_PORTS.items():
        require_free(int(os.environ.get(name, default)), name)

    models = model_ids(config)
    # A cluster of its own, whatever else runs on this machine.
    serve = Containment(["serve", "run", "--address", "local", path], GRACE_S)
    readiness = Readiness(models, port, serve.pid)
    status = serve.run(while_running=readiness.look)
    if serve.stopping:
        print("run: everything has ended", flush=True)
        return
    when = "ended" if readiness.reached else "ended before the models were ready"
    sys.exit(f"run: `serve run` {when} (status {status}); logs: {log_folder(serve.pid)}")


if __name__ == "__main__":
    main()
