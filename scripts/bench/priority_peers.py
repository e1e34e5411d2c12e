"""Gateways of others that have an order of priority, before an engine, for the burst benchmark.

scripts/bench/install_peers installs them. What is not installed is left out.

- SMG has its priority scheduler on. It is told the class by a header, and the body keeps the
  engine's own ``priority``. Priority has a slot reserved, as Frontline's headroom on 8 slots. Its
  worker is registered with the engine's slots as a label: otherwise SMG takes each worker for one
  of 64, and its scheduler never has anybody wait.
- LiteLLM has its own ``priority`` (lower goes first), which it does not pass on.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from scripts.bench import gateways
from scripts.bench.burst import Contender
from scripts.bench.drive import Gateway
from scripts.bench.load import Endpoint

_CLASSES = {"priority": "interactive", "default": "default", "flex": "bulk"}
_LITELLM_TIERS = {
    "priority": {"priority": 0},
    "default": {"priority": 100},
    "flex": {"priority": 200},
}
_LONGEST_WAIT_S = 600
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Behind:
    """The engine behind a peer."""

    endpoint: Endpoint
    slots: int

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return f"http://{urlsplit(self.endpoint.base_url).netloc}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway of somebody else.

    Attributes:
        name: of its environment.
        command: its command line, for its folder, its port, the engine and a folder to write to.
        endpoint: how requests go through it, made from the engine's own endpoint.
        prepare: what it is told at its address once it runs.
    """

    name: str
    command: Callable[[Path, int, Behind, Path], list[str]]
    endpoint: Callable[[Endpoint], Endpoint]
    prepare: Callable[[str, Behind], None] = lambda url, engine: None


def smg_classes() -> dict[str, Any]:
    """Return the settings of SMG's scheduler: everybody may wait, priority has one slot."""

    def settings(reserved: int, *, can_preempt: bool) -> dict[str, Any]:
        return {
            "reserved_floor": reserved,
            "queue_size": 4096,
            "queue_timeout_secs": _LONGEST_WAIT_S,
            "starvation_threshold_secs": _LONGEST_WAIT_S,
            "can_preempt": can_preempt,
        }

    return {
        "classes": {
            "system": settings(0, can_preempt=False),
            "interactive": settings(1, can_preempt=True),
            "default": settings(0, can_preempt=False),
            "bulk": settings(0, can_preempt=False),
        }
    }


def _smg(folder: Path, port: int, engine: Behind, scratch: Path) -> list[str]:
    config = scratch / "smg.yaml"
    config.write_text(yaml.safe_dump(smg_classes()))
    return [
        *(f"{folder}/bin/smg", "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--policy", "round_robin", "--log-level", "error", "--api-key", engine.endpoint.key),
        # It asks a worker of its own kind for its health without a key.
        *("--backend", "openai", "--disable-health-check"),
        *("--prometheus-port", str(gateways.free_port())),
        *("--max-concurrent-requests", str(engine.slots), "--priority-scheduler-enabled"),
        *("--priority-scheduler-default-max-class", "interactive"),
        *("--priority-scheduler-config", str(config)),
    ]


def _register_worker(url: str, engine: Behind) -> None:
    """Tell SMG of the engine, once it listens."""
    worker = {
        "url": engine.url,
        "api_key": engine.endpoint.key,
        "runtime_type": "external",
        "labels": {"max_running_requests": str(engine.slots)},
    }
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {engine.endpoint.key}",
    }
    request = urllib.request.Request(f"{url}/workers", json.dumps(worker).encode(), headers)
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _through_smg(engine: Endpoint) -> Endpoint:
    headers = {tier: {"x-smg-priority": name} for tier, name in _CLASSES.items()}
    return replace(engine, name="smg", headers=headers)


def _litellm(folder: Path, port: int, engine: Behind, scratch: Path) -> list[str]:
    parameters = {
        "model": f"openai/{engine.endpoint.model}",
        "api_base": engine.endpoint.base_url,
        "api_key": engine.endpoint.key,
    }
    config = scratch / "litellm.yaml"
    models = [{"model_name": engine.endpoint.model, "litellm_params": parameters}]
    config.write_text(yaml.safe_dump({"model_list": models}))
    config.chmod(0o600)
    return [
        *(f"{folder}/bin/litellm", "--config", str(config), "--host", "127.0.0.1"),
        *("--port", str(port), "--num_workers", "1", "--telemetry", "False"),
    ]


def _through_litellm(engine: Endpoint) -> Endpoint:
    return replace(engine, name="litellm", key="none", tiers=_LITELLM_TIERS)


PEERS = (
    Peer("smg", _smg, _through_smg, _register_worker),
    Peer("litellm", _litellm, _through_litellm),
)


def at_port(endpoint: Endpoint, port: int) -> Endpoint:
    """Return an endpoint moved to a port of this machine."""
    return replace(endpoint, base_url=f"http://127.0.0.1:{port}/v1")


@contextmanager
def running(engine: Contender, slots: int) -> Iterator[list[Contender]]:
    """Start the peers that are installed. One that does not start is reported and left out."""
    home = Path(os.environ.get("FRONTLINE_HOME", ""))
    behind = Behind(engine.endpoint, slots)
    with gateways.scratch() as folder, ExitStack() as stack:
        started = []
        for peer in PEERS:
            installed = home / "envs" / f"peer-{peer.name}"
            if not installed.exists():
                continue
            try:
                endpoint = stack.enter_context(_running(peer, installed, behind, folder))
            except (RuntimeError, OSError) as error:
                print(f"contention: {error}", file=sys.stderr)
                continue
            started.append(replace(engine, endpoint=endpoint))
        yield started


@contextmanager
def _running(peer: Peer, installed: Path, engine: Behind, folder: Path) -> Iterator[Endpoint]:
    port, log = gateways.free_port(), folder / f"{peer.name}.log"
    command = peer.command(installed.resolve(), port, engine, folder)
    with gateways.running(peer.name, command, log, **gateways.QUIET) as process:
        endpoint = at_port(peer.endpoint(engine.endpoint), port)
        peer.prepare(f"http://127.0.0.1:{port}", engine)
        probe = Gateway(peer.name, port, dict, (), model=endpoint.model, key=endpoint.key)
        gateways.until_answers(probe, process, log)
        yield endpoint
