"""``frontline doctor CONFIG``: whether what a config file describes would start on this machine.

The applications are built as Serve builds them. Each deployment class with an ``examine`` method
looks at this machine as its replicas would. What belongs to no pool is looked at here: the ports,
and the number of GPUs for all pools together.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import yaml

from app.cli.applications import build_application
from app.cli.listening import Listener, family, listeners, processes
from app.contracts.findings import Examination, Finding, Level, error, has_error, ok, warning
from app.contracts.start import StartProblem
from app.core.names import MODEL_DEPLOYMENT
from app.haproxy.config import BadSetting, whole_number
from app.ray_compat.application import deployments_of

HAPROXY_PORTS: Final = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
}
REPLICA_PORTS: Final = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": 30000,
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": 31000,
}
"""The range from which Serve takes the ports of ingress replicas and Models (Ray 2.60)."""


@dataclass(frozen=True, slots=True)
class PoolFindings:
    """What was found about one pool.

    Attributes:
        name: the model's id and the pool's name.
        gpus: GPUs that all its replicas take at least.
        examination: what was found.
    """

    name: str
    gpus: float
    examination: Examination


@dataclass(frozen=True, slots=True)
class Port:
    """A port that Frontline opens.

    Attributes:
        number: its number.
        setting: what sets it.
        taken: whether another process listens there.
    """

    number: int
    setting: str
    taken: bool


def port_finding(port: Port) -> Finding:
    """Return the finding about a port."""
    if not port.taken:
        return ok(f"port {port.number} is free")
    return error(
        f"port {port.number} is in use", "Frontline listens there",
        f"end what listens there, or set {port.setting}", StartProblem.PORT_IN_USE,
    )  # fmt: skip


def neighbour_findings(listening: Sequence[Listener], least: int, most: int) -> list[Finding]:
    """Return the finding that another Serve on this machine uses the same range of ports."""
    others = [one for one in listening if least <= one.port <= most]
    if not others:
        return []
    first = others[0]
    return [
        error(
            f"{first.process} (pid {first.pid}) listens on port {first.port}: another Ray Serve "
            "runs here",
            f"replicas take ports from {least} to {most} and share them, so that one instance may "
            "answer for the other",
            f"end it, or set {' and '.join(REPLICA_PORTS)} to a range of its own",
            StartProblem.PORT_IN_USE,
        )
    ]


def gpu_findings(pools: Sequence[PoolFindings]) -> list[Finding]:
    """Return what the pools need together and one machine does not have."""
    here = max((pool.examination.gpus_here for pool in pools), default=0)
    wanted = sum(pool.gpus for pool in pools)
    if not here or wanted <= here:
        return []
    return [
        warning(
            f"all replicas together take {wanted:g} GPUs, {here} are here",
            "on this machine alone some of them wait for ever",
            "fewer replicas or pools, or more nodes (docs/cluster.md)",
        )
    ]


def examine(text: str) -> dict[str, list[Finding]]:
    """Return the findings about a config file that has passed ``app.cli.check``, by subject."""
    config = yaml.safe_load(text)
    applications = config.get("applications") or ()
    pools = [pool for application in applications for pool in _pools(application)]
    return {
        "this machine": [*_port_findings(config), *gpu_findings(pools)],
        **{pool.name: list(pool.examination.findings) for pool in pools},
    }


def to_text(found: Mapping[str, Sequence[Finding]], *, brief: bool) -> str:
    """Return a line for each finding, worst first within its subject, and a summary."""
    lines = [
        f"{subject}: {finding}"
        for subject, findings in found.items()
        for finding in sorted(findings, key=lambda one: list(Level).index(one.level))
        if not (brief and finding.level is Level.OK)
    ]
    counts = {
        level: sum(one.level is level for findings in found.values() for one in findings)
        for level in Level
    }
    errors, warnings = counts[Level.ERROR], counts[Level.WARNING]
    summary = f"{errors} errors, {warnings} warnings" if errors or warnings else "all is well"
    return "\n".join([*lines, summary])


def to_json(found: Mapping[str, Sequence[Finding]]) -> dict[str, Any]:
    """Return the findings as plain values, by subject."""
    return {subject: [asdict(one) for one in findings] for subject, findings in found.items()}


def run(text: str, *, as_json: bool, brief: bool) -> bool:
    """Print what is found about a config file; return whether there is no error."""
    found = examine(text)
    print(json.dumps(to_json(found), indent=2) if as_json else to_text(found, brief=brief))
    return not any(map(has_error, found.values()))


def _pools(application: Mapping[str, Any]) -> Iterator[PoolFindings]:
    deployments = {one.name: one for one in deployments_of(build_application(application))}
    if MODEL_DEPLOYMENT not in deployments:
        return
    options = {one["name"]: one for one in application.get("deployments") or ()}
    for name, deployment in deployments.items():
        look = getattr(deployment.func_or_class, "examine", None)
        if look is None:
            continue
        own = options.get(name, {})
        gpus = float((own.get("ray_actor_options") or {}).get("num_gpus") or 0)
        model_id, pool = deployment.init_args
        least = own.get("num_replicas") or (own.get("autoscaling_config") or {}).get("min_replicas")
        number = least if isinstance(least, int) else 1
        nodes = len(own.get("placement_group_bundles") or [None])
        yield PoolFindings(
            f"{model_id}, pool {name}", gpus * number * nodes, look(model_id, pool, gpus)
        )


def _port_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    http = config.get("http_options") or {}
    yield port_finding(_port(http.get("port", 8000), "http_options.port"))
    for name, default in HAPROXY_PORTS.items():
        try:
            number = whole_number(os.environ, name, default, least=1)
            yield port_finding(_port(number, name))
        except BadSetting as problem:
            why = "HAProxy does not start with it"
            yield error(str(problem), why, f"correct {name}", StartProblem.PORT_IN_USE)
    least, most = (_number(name, default) for name, default in REPLICA_PORTS.items())
    yield from neighbour_findings(listeners(family(processes())), least, most)


def _number(name: str, default: int) -> int:
    """Return a number of the environment; the default if it is none, which Serve itself reports."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def _port(number: int, setting: str) -> Port:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return Port(number, setting, probe.connect_ex(("127.0.0.1", number)) == 0)
