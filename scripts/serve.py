"""`serve run CONFIG`, contained, with word of when its models are ready. Called by scripts/run."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from app.cli.doctor import findings, look_around
from app.cli.starts import Starts
from app.haproxy.config import BadSetting, whole_number
from deployments.process.reaper import Identity, descendants, is_running
from scripts.contain import Containment, process_name

MODEL = "deployments.model:build"
GRACE_S = 60.0
POLL_S = 1.0
REPEAT_S = 10.0
RAY = frozenset({"raylet", "gcs_server"})
"""Without one of these processes nothing can be started any more, and Ray does not restart them:
`serve run` would wait for ever."""
LOST_GRACE_S = 5.0
"""What is left of Ray cannot end in order then; its workers end by themselves."""
HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
EXAMPLE = """\
curl {url}/chat/completions -H 'content-type: application/json'{key} -d '{{
  "model": "{model}", "service_tier": "priority",
  "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'"""
KEY_HEADER = ' -H "authorization: Bearer $KEY"'


def log_folder(driver: int) -> Path:
    """Ray names a session after the process that started it; `session_latest` may be another's."""
    sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    return next(sessions.glob(f"session_*_{driver}/logs"), sessions / "session_latest/logs")


def report_folder(driver: int) -> Path | None:
    """Return where the replicas of this run write how their starts go; none before there is one."""
    sessions = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    session = next(sessions.glob(f"session_*_{driver}"), None)
    return None if session is None else session / "logs" / "serve"


class Readiness:
    """Asks the ingress for its models until each of them serves some tier."""

    def __init__(self, models: list[str], port: int, driver: int) -> None:
        self._models = models
        self._starts = Starts(partial(report_folder, driver))
        self._driver = driver
        self._root = f"http://127.0.0.1:{port}"
        self._url = f"{self._root}/v1"
        self._started = time.monotonic()
        self._next_poll = 0.0
        self._last_said = (0.0, "")
        self._keyed = False
        self.reached = False

    def look(self) -> None:
        now = time.monotonic()
        if now < self._next_poll:
            return
        self._next_poll = now + POLL_S
        # Also after all models were ready: an engine may be replaced.
        for failure in self._starts.failures():
            print(f"run [{now - self._started:4.0f}s] {failure}", flush=True)
        if self.reached:
            return
        try:
            waiting = self._waiting()
        except (OSError, ValueError, KeyError):
            self._say("the ingress is starting", self._starts.progress())
        else:
            if waiting:
                self._say(f"waiting for {waiting}", self._starts.progress())
            else:
                self.reached = True
                self._announce()

    def _waiting(self) -> str:
        """What does not answer yet, in words. Raises while the ingress itself does not."""
        try:
            entries = self._get(f"{self._url}/models")["data"]
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            self._keyed = True
            return self._waiting_by_number()
        serving = {entry["id"] for entry in entries if entry.get("service_tiers")}
        return ", ".join(model for model in self._models if model not in serving)

    def _waiting_by_number(self) -> str:
        """The same where names are shown to keys alone: `/health` counts the models."""
        states = self._get(f"{self._root}/health")["model_states"]
        missing = len(self._models) - states.get("ready", 0) - states.get("asleep", 0)
        return f"{missing} of {len(self._models)} models" if missing > 0 else ""

    def _get(self, url: str) -> Any:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return json.load(answer)

    def _say(self, what: str, more: Sequence[str] = ()) -> None:
        """Print what it waits for: when that changes, and now and then."""
        now = time.monotonic()
        said_at, said = self._last_said
        if what == said and now - said_at < REPEAT_S:
            return
        where = f"; logs: {log_folder(self._driver)}" if what == said else ""
        print(f"run [{now - self._started:4.0f}s] {what}{where}", flush=True)
        for line in more:
            print(f"             {line}", flush=True)
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
        if self._keyed:
            lines += ["Clients need an API key: scripts/frontline keys create --tenant NAME", ""]
        if self._models:
            key = KEY_HEADER if self._keyed else ""
            lines += [EXAMPLE.format(url=self._url, model=self._models[0], key=key), ""]
        open_here = findings(look_around(os.environ, Path.home()))
        lines += [f"! {finding}" for finding in open_here]
        if open_here:
            lines += ["docs/security.md says what of it may be; `scripts/frontline doctor`", ""]
        print("\n".join([*lines, "Ctrl-C ends it."]), flush=True)


class Cluster:
    """Notices when Ray itself has died below `serve run`."""

    def __init__(self) -> None:
        self._found: dict[str, Identity] = {}
        self._next_look = 0.0

    def lost(self) -> str | None:
        """Name a process of Ray's that has run and does not any more."""
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + POLL_S
        if len(self._found) < len(RAY):
            self._find()
        return next((name for name, one in self._found.items() if not is_running(one)), None)

    def _find(self) -> None:
        for process in descendants(os.getpid()):
            name = process_name(process.identity.pid)
            if name in RAY:
                self._found.setdefault(name, process.identity)


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
        try:
            require_free(whole_number(os.environ, name, default, least=1), name)
        except BadSetting as error:
            sys.exit(f"run: {error}")

    models = model_ids(config)
    # A cluster of its own, whatever else runs on this machine.
    serve = Containment(["serve", "run", "--address", "local", path], GRACE_S)
    readiness = Readiness(models, port, serve.pid)
    cluster, lost = Cluster(), None

    def look() -> None:
        nonlocal lost
        lost = cluster.lost()
        if lost is None:
            readiness.look()
        else:
            print(f"run: Ray's {lost} has died: ending what is left", flush=True)
            serve.end(LOST_GRACE_S)

    status = serve.run(while_running=look)
    if lost is not None:
        sys.exit(
            f"run: everything has ended, since Ray's {lost} had died; logs: {log_folder(serve.pid)}"
        )
    if serve.stopping:
        print("run: everything has ended", flush=True)
        return
    when = "ended" if readiness.reached else "ended before the models were ready"
    sys.exit(f"run: `serve run` {when} (status {status}); logs: {log_folder(serve.pid)}")


if __name__ == "__main__":
    main()
