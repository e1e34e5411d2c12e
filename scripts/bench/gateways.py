"""What the overhead benchmark starts: a mock engine, Frontline beside a bare passage, and peers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import psutil
import yaml

from app.core.tiers import Tier
from app.ledger.record import now_utc
from app.store.database import connect, migrate
from app.store.database_url import resolve_url
from app.tenants.key_store import KeyStore
from app.tenants.keys import create_key
from scripts.bench.drive import Gateway, Roles
from scripts.bench.overhead_report import UNMEASURED
from scripts.bench.switchable import UNOBSERVED

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_MARK = "FRONTLINE_BENCH_RUN"
_START_S = 180.0
_STOP_S = 30.0
_MODEL = "bench/mock"
_SLOTS = 2048
# By a word of the command line, the first that is there.
_CLUSTER_ROLES = {
    "ray::ServeReplica:ingress:Ingress": "ingress",
    "ray::ServeReplica:passthrough:": "passthrough",
    "haproxy": "HAProxy",
    "mock_engine": "engine",
    "ray::ServeReplica:mock:Model": "Model",
    "ray::ServeController": "controller",
}


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Cluster:
    """Frontline and the bare passage on one Ray cluster, and where Frontline's records are.

    ``unobserved`` is the same Frontline, without metrics, access log and traces, if it can be
    switched.
    """

    frontline: Gateway
    unobserved: Gateway
    passthrough: Gateway
    database: Path
    processes: Callable[[], Roles]


@contextmanager
def running(
    name: str, command: list[str], log: Path, **environment: str
) -> Iterator[psutil.Process]:
    """Run a server, and end it and whatever comes from it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
        )  # fmt: skip
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            print(f"overhead: {name} does not end by itself", file=sys.stderr)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(gateway: Gateway) -> dict[str, Any]:
    """Send a gateway one request, and return its answer.

    Raises:
        OSError: there is none within five seconds, or it is an error.
        ValueError: it is no JSON.
    """
    headers = {"content-type": "application/json", "authorization": f"Bearer {gateway.key}"}
    headers |= dict(line.split(": ", 1) for line in gateway.headers)
    url = f"http://127.0.0.1:{gateway.port}{gateway.path}"
    request = urllib.request.Request(url, gateway.body(stream=False), headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        answered: dict[str, Any] = orjson.loads(answer.read())
    return answered


def until_answers(gateway: Gateway, process: psutil.Process, log: Path) -> None:
    """Wait until a gateway answers a request.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + _START_S
    while True:
        try:
            answered = ask(gateway)
            # While a model starts, priority is not delivered.
            if gateway.tier in (None, answered.get("service_tier")):
                return
        except (OSError, ValueError):
            pass
        if process.status() == psutil.STATUS_ZOMBIE or time.monotonic() > deadline:
            last = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{gateway.name} does not answer: {last}")
        time.sleep(0.3)


@contextmanager
def mock_engine(folder: Path) -> Iterator[Gateway]:
    """The engine by itself: the floor under every gateway, and what the peers stand before."""
    port, log = free_port(), folder / "engine.log"
    command = [sys.executable, str(_HERE / "mock_engine.py"), "--port", str(port)]
    with running("engine", command, log) as process:
        direct = Gateway("engine alone", port, lambda: {"engine": [process]}, ("engine",))
        until_answers(direct, process, log)
        yield direct


@contextmanager
def cluster(
    folder: Path, engine: Gateway, *, ingresses: int, switchable: bool = False
) -> Iterator[Cluster]:
    """Serve both with `serve run`, as scripts/run does.

    ``switchable``: requests may choose to be ``unobserved``.
    """
    port, database, log = free_port(), folder / "usage.db", folder / "serve.log"
    key = _make_key(database)
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(_config(folder, port, engine, ingresses, switchable)))
    environment = _environment(folder)
    serve = ["serve", "run", "--address", "local", str(config)]
    with running("serve", serve, log, **environment) as process:

        def processes() -> Roles:
            # Looked up each time: Serve starts another HAProxy whenever its routes change.
            return _cluster_processes(environment[_MARK])

        frontline = Gateway(
            "Frontline", port, processes, ("ingress", "HAProxy"),
            model=_MODEL, key=key, tier=Tier.PRIORITY.value,
        )  # fmt: skip
        unobserved = replace(frontline, name=UNMEASURED, headers=(UNOBSERVED,))
        path = f"/passthrough{frontline.path}"
        bare = Gateway("bare Serve", port, processes, ("passthrough", "HAProxy"), path=path)
        until_answers(frontline, process, log)
        until_answers(bare, process, log)
        yield Cluster(frontline, unobserved, bare, database, processes)


def _make_key(database: Path) -> str:
    store = connect(resolve_url(f"sqlite:///{database}"))
    migrate(store)
    key, text = create_key("bench", created=now_utc())
    KeyStore(store).add(key)
    store.dispose()
    return text


def _environment(folder: Path) -> dict[str, str]:
    haproxy = folder / "haproxy"
    haproxy.mkdir(mode=0o700)
    shared = str(Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent)
    return {
        name: value.replace(shared, str(haproxy), 1)
        for name, value in os.environ.items()
        if name.startswith("RAY_SERVE_HAPROXY_") and value.startswith(shared)
    } | {
        _MARK: str(os.getpid()),
        "FRONTLINE_BENCH_PYTHON": sys.executable,
        # Beside other clusters of this machine.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        # As in scripts/run.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def _config(
    folder: Path, port: int, engine: Gateway, ingresses: int, switchable: bool
) -> dict[str, object]:
    user_config = {
        "auth": "keys",
        "ledger": f"sqlite:///{folder}/usage.db",
        "journal": {"folder": f"{folder}/journal"},
    }
    pool = {
        "name": "mock",
        "engine": "simulated",
        "model": "mock",
        "python": str(_HERE / "mock_python"),
        "slots": _SLOTS,
    }
    rate_card = {"input": 0.02, "cached_input": 0.01, "output": 0.04}
    url = f"http://127.0.0.1:{engine.port}{engine.path}"
    few = {"num_cpus": 0.1}

    def application(name: str, prefix: str | None, path: str, **rest: object) -> dict[str, object]:
        return {"name": name, "route_prefix": prefix, "import_path": path, **rest}

    module = "scripts.bench.switchable" if switchable else "app.ingress"
    ingress = {"name": "Ingress", "num_replicas": ingresses, "ray_actor_options": few}
    model = {"name": "Model", "user_config": {"rate_card": rate_card}}
    bare = {"name": "Passthrough", "num_replicas": ingresses, "ray_actor_options": few}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 3600},
        "applications": [
            application(
                "ingress", "/", f"{module}:build",
                deployments=[{**ingress, "user_config": user_config}],
            ),
            application(
                "mock", None, "deployments.model:build",
                args={"id": _MODEL, "pools": [pool]},
                deployments=[model, {"name": "mock", "ray_actor_options": few}],
            ),
            application(
                "passthrough", "/passthrough", "scripts.bench.passthrough:build",
                args={"url": url}, deployments=[bare],
            ),
        ],
    }  # fmt: skip


def _cluster_processes(mark: str) -> dict[str, list[psutil.Process]]:
    roles: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) != mark:
                continue
            line = " ".join(process.cmdline())
            role = next((role for word, role in _CLUSTER_ROLES.items() if word in line), "other")
            roles.setdefault(role, []).append(process)
    return roles


# --- peers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway of somebody else, as scripts/bench/install_peers installs it.

    Attributes:
        name: of its environment.
        command: its command line, for its folder, its port, the engine's port and a folder to
            write to.
        headers: what its requests carry besides.
    """

    name: str
    command: Callable[[Path, int, int, Path], list[str]]
    headers: Callable[[int], tuple[str, ...]] = lambda _: ()


def _vllm_router(folder: Path, port: int, engine: int, scratch: Path) -> list[str]:
    return [
        *(f"{folder}/bin/vllm-router", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", f"http://127.0.0.1:{engine}", "--policy", "round_robin"),
        *("--prometheus-port", str(free_port()), "--log-level", "error"),
        *("--max-concurrent-requests", "4096"),
    ]


def _smg(folder: Path, port: int, engine: int, scratch: Path) -> list[str]:
    return [
        *(f"{folder}/bin/smg", "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", f"http://127.0.0.1:{engine}", "--policy", "round_robin"),
        *("--backend", "openai"),
        *("--prometheus-port", str(free_port()), "--log-level", "error"),
        *("--max-concurrent-requests", "4096"),
    ]


def _sglang_router(folder: Path, port: int, engine: int, scratch: Path) -> list[str]:
    return [
        *(f"{folder}/bin/python", "-m", "sglang_router.launch_router", "--host", "127.0.0.1"),
        *("--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine}"),
        *("--policy", "round_robin", "--prometheus-port", str(free_port())),
        *("--log-level", "error", "--max-concurrent-requests", "4096"),
    ]


def _litellm(folder: Path, port: int, engine: int, scratch: Path) -> list[str]:
    parameters = {
        "model": "openai/mock",
        "api_base": f"http://127.0.0.1:{engine}/v1",
        "api_key": "none",
    }
    config = scratch / "litellm.yaml"
    models = [{"model_name": "mock", "litellm_params": parameters}]
    config.write_text(yaml.safe_dump({"model_list": models}))
    return [
        *(f"{folder}/bin/litellm", "--config", str(config), "--host", "127.0.0.1"),
        *("--port", str(port), "--num_workers", "1", "--telemetry", "False"),
    ]


def _portkey(folder: Path, port: int, engine: int, scratch: Path) -> list[str]:
    node = shutil.which("node") or "node"
    server = folder / "node_modules/@portkey-ai/gateway/build/start-server.js"
    return [node, str(server), f"--port={port}", "--headless"]


def _portkey_headers(engine: int) -> tuple[str, ...]:
    host = f"x-portkey-custom-host: http://127.0.0.1:{engine}/v1"
    return ("x-portkey-provider: openai", host)


PEERS = (
    Peer("vllm-router", _vllm_router),
    Peer("smg", _smg),
    Peer("sglang-router", _sglang_router),
    Peer("litellm", _litellm),
    Peer("portkey", _portkey, _portkey_headers),
)


# Nothing of ours is on its path, and it asks nobody for prices or models.
QUIET = {
    "PYTHONPATH": "",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # It listens on loopback, for as long as the benchmark runs.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "NODE_ENV": "production",
}
"""A peer's environment."""


@contextmanager
def peers(
    folder: Path, engine: Gateway, home: Path, wanted: Callable[[str], bool]
) -> Iterator[list[Gateway]]:
    """Start the peers that are installed. One that does not start is told of, and left out."""
    with ExitStack() as stack:
        started = []
        for peer in PEERS:
            installed = home / "envs" / f"peer-{peer.name}"
            if wanted(peer.name) and installed.exists():
                try:
                    started.append(stack.enter_context(_peer(peer, installed, folder, engine)))
                except RuntimeError as error:
                    print(f"overhead: {error}", file=sys.stderr)
        yield started


@contextmanager
def _peer(peer: Peer, installed: Path, folder: Path, engine: Gateway) -> Iterator[Gateway]:
    port, log = free_port(), folder / f"{peer.name}.log"
    command = peer.command(installed.resolve(), port, engine.port, folder)
    with running(peer.name, command, log, **QUIET) as process:

        def processes() -> Roles:
            with suppress(psutil.Error):
                return {"gateway": [process, *process.children(recursive=True)]}
            return {}

        headers = peer.headers(engine.port)
        gateway = Gateway(peer.name, port, processes, ("gateway",), headers=headers)
        until_answers(gateway, process, log)
        yield gateway


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one run. Its path is short: a Unix socket's has at most 107 bytes."""
    with TemporaryDirectory(prefix="fl-") as folder:
        yield Path(folder)
