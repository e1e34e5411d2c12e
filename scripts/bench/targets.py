"""What the benchmark measures: a server that runs already, or one started for it.

What is started here is Frontline itself, as the tests start it, and its engine is measured once
more without Frontline. Both endpoints stand on the same engine process.

For bursts there are two engines, one with preemption and one without. Frontline stands before
each. The engine without preemption is measured by itself as well, and behind the peers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from scripts.bench.burst import Contender
from scripts.bench.burst_summary import HEADROOM, PREEMPTION
from scripts.bench.effort import Processes
from scripts.bench.load import Endpoint

FRONTLINE_TIERS: dict[str, dict[str, Any]] = {
    "priority": {"service_tier": "priority"},
    "default": {"service_tier": "default"},
    "flex": {"service_tier": "flex"},
}
ENGINE_TIERS: dict[str, dict[str, Any]] = {
    "priority": {"priority": -100},
    "default": {"priority": 0},
    "flex": {"priority": 100},
}
"""vLLM's own field, and the numbers that Frontline gives it; lower goes first."""

_SIMULATED = "bench"
_SIMULATION: dict[str, Any] = {
    "slots": 32,
    "tokens_per_second": 50,
    "first_token_seconds": 0.05,
    "prefill_seconds_per_token": 0.0002,
}
"""A small chat model on one GPU: 5,000 tokens of prefill and 50 of each answer a second."""

_DISCOVERY_S = 2.0
"""The ingress's own default; tests look for models more often, which is work."""

_LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"
_CHAT = "smollm2"
_START_S = 420.0
_POOL_START_S = 1800.0
"""A large model may take long to start."""
_ROLES = {
    "deployments.simulator": "engine",
    "vllm.entrypoints": "engine",
    "VLLM::": "engine",
    "haproxy": "HAProxy",
    "ServeReplica:ingress": "ingress",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured, in this order.

    Attributes:
        endpoints: the same load goes to each of them.
        processes: tells what they use, where it is known.
        simulated: whether the engine computes nothing.
        engine: what stands behind, in words.
    """

    endpoints: tuple[Endpoint, ...]
    processes: Processes = dict
    simulated: bool = False
    engine: str = "unknown"


@dataclass(frozen=True, slots=True)
class Contenders:
    """What is measured by turns.

    Attributes:
        each: the same load goes to each of them.
        slots: how many requests each engine runs at once.
        processes: returns the processor time of the server's processes.
        simulated: whether the engines compute nothing.
        engine: the engine and its version.
    """

    each: tuple[Contender, ...]
    slots: int
    processes: Processes = dict
    simulated: bool = False
    engine: str = "unknown"


@contextmanager
def simulated() -> Iterator[Target]:
    """Frontline over the simulated engine."""
    with _frontline() as (deployment, cluster):
        app = cluster.simulated_app(_SIMULATED, default_completion_tokens=64, **_SIMULATION)
        deployment.deploy(cluster.ingress_app(discovery_interval_s=_DISCOVERY_S), app)
        deployment.wait_ready(_SIMULATED)
        yield _both(deployment, _SIMULATED, {}, simulated=True)


@contextmanager
def vllm() -> Iterator[Target]:
    """Frontline over vLLM on the CPU, as configs/local.yaml has it."""
    with _frontline() as (deployment, cluster):
        apps = yaml.safe_load(_LOCAL.read_text())["applications"]
        # Its own ingress but for the ledger, which a benchmark's requests do not belong into.
        [chat] = (app for app in apps if app["name"] == _CHAT)
        deployment.deploy(cluster.ingress_app(discovery_interval_s=_DISCOVERY_S), chat)
        deployment.wait_ready(_CHAT, timeout_s=_START_S)
        # A model ends its answer where it likes: this makes lengths what was asked for.
        yield _both(deployment, _CHAT, {"ignore_eos": True}, simulated=False)


def burst_simulated() -> AbstractContextManager[Contenders]:
    """Contenders on the simulated engine."""
    return _contenders(_simulated_app, {}, simulated=True)


def burst_vllm() -> AbstractContextManager[Contenders]:
    """Contenders on vLLM on the CPU, as configs/local.yaml has it."""
    return _contenders(_local_chat, {"ignore_eos": True}, simulated=False)


@contextmanager
def burst_pool(file: Path) -> Iterator[Contenders]:
    """Frontline over the one pool that scripts/gpu_check wrote into a file."""
    with _frontline() as (deployment, cluster):
        from tests.engines.subjects import checked_subject

        subject = checked_subject(file)
        ingress = cluster.ingress_app(discovery_interval_s=_DISCOVERY_S)
        deployment.deploy(ingress, subject.app())
        deployment.wait_ready(subject.model, timeout_s=_POOL_START_S)
        [replica] = deployment.snapshot(subject.model).replicas
        endpoint = Endpoint(
            *(PREEMPTION if replica.preempts else HEADROOM, deployment.base_url, subject.model),
            *("none", FRONTLINE_TIERS, {"ignore_eos": True}),
        )
        contender = Contender(endpoint, replica.base_url, replica.key)
        engine = f"{replica.dialect.engine} {replica.engine_version}, {replica.slots} slots"
        simulated = replica.dialect.simulated
        yield Contenders((contender,), replica.slots, _cluster_processes, simulated, engine)


def _simulated_app() -> dict[str, Any]:
    from tests.support.cluster import simulated_app

    return simulated_app(_SIMULATED, default_completion_tokens=64, **_SIMULATION)


def _local_chat() -> dict[str, Any]:
    apps = yaml.safe_load(_LOCAL.read_text())["applications"]
    [chat] = (app for app in apps if app["name"] == _CHAT)
    return dict(chat)


@contextmanager
def _contenders(
    app: Callable[[], dict[str, Any]], body: dict[str, Any], *, simulated: bool
) -> Iterator[Contenders]:
    with _frontline() as (deployment, cluster):
        from scripts.bench import priority_peers

        preempting = app()
        plain = without_preemption(preempting)
        ingress = cluster.ingress_app(discovery_interval_s=_DISCOVERY_S)
        deployment.deploy(ingress, preempting, plain)
        names = {HEADROOM: plain["name"], PREEMPTION: preempting["name"]}
        deployment.wait_ready(*names.values(), timeout_s=_START_S)
        replica = _only_replica(deployment, plain["name"], preempts=False)
        model = deployment.snapshot(plain["name"]).id
        direct = Contender(
            Endpoint(
                "engine alone", f"{replica.base_url}/v1", model, replica.key, ENGINE_TIERS, body
            ),
            replica.base_url,
            replica.key,
        )
        through = []
        for title, name in names.items():
            own = _only_replica(deployment, name, preempts=title == PREEMPTION)
            endpoint = Endpoint(title, deployment.base_url, name, "none", FRONTLINE_TIERS, body)
            through.append(Contender(endpoint, own.base_url, own.key))
        engine = f"{replica.dialect.engine} {replica.engine_version}, {replica.slots} slots"
        with priority_peers.running(direct, replica.slots) as peers:
            each = (direct, *through, *peers)
            yield Contenders(each, replica.slots, _cluster_processes, simulated, engine)


def _only_replica(deployment: Any, app: str, *, preempts: bool) -> Any:
    [replica] = deployment.snapshot(app).replicas
    if replica.preempts is not preempts:
        raise RuntimeError(f"{app}: its engine says that preempts={replica.preempts}")
    return replica


def without_preemption(app: dict[str, Any]) -> dict[str, Any]:
    """Return a model's application under another name, with preemption off in every pool."""
    plain = deepcopy(app)
    plain["name"] = f"{app['name']}-plain"
    plain["args"]["id"] = f"{app['args']['id']}-plain"
    plain["args"]["aliases"] = [plain["name"]]
    for pool in plain["args"]["pools"]:
        pool["preemption"] = False
    return plain


@contextmanager
def _frontline() -> Iterator[tuple[Any, Any]]:
    # It sets what Ray reads when it is imported, so it comes first.
    import tests.conftest  # noqa: F401
    from tests.support import cluster

    with cluster.local_serve() as deployment:
        yield deployment, cluster


def _both(deployment: Any, app: str, body: dict[str, Any], *, simulated: bool) -> Target:
    snapshot = deployment.snapshot(app)
    [replica] = snapshot.replicas
    through = Endpoint("Frontline", deployment.base_url, app, "none", FRONTLINE_TIERS, body)
    alone = Endpoint(
        "engine alone", f"{replica.base_url}/v1", snapshot.id, replica.key, ENGINE_TIERS, body
    )
    engine = f"{replica.dialect.engine} {replica.engine_version}, {replica.slots} slots"
    return Target((through, alone), _cluster_processes, simulated, engine)


def _cluster_processes() -> dict[str, float]:
    from tests.support.cluster import test_run_processes

    used: defaultdict[str, float] = defaultdict(float)
    for process in test_run_processes():
        with suppress(psutil.Error, OSError):
            line = " ".join(process.cmdline())
            role = next((role for mark, role in _ROLES.items() if mark in line), "Ray and others")
            times = process.cpu_times()
            used[role] += times.user + times.system
    return dict(used)
