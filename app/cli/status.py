"""``frontline status``: shows the whole deployment at one moment.

All data comes from Ray, Serve and the Models; ingresses and engines are not queried.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import ray
import yaml
from rich.console import Console

from app.cli.board import ModelFrame, make_frame
from app.cli.cluster import Cluster, NothingToShow, connect, silence_ray
from app.cli.diff import Difference, differences
from app.cli.starts import Starts
from app.contracts.stats import REPORT_S
from app.ray_compat.cluster import available_resources
from app.ray_compat.controller import serve_controller
from app.ray_compat.serve_logs import session_logs

_APART_S: Final = REPORT_S + 0.5
"""Time between the two polls of the queues: every ingress sends a new report in between."""
_ANSWER_S: Final = 10.0
_SHOWN: Final = ("CPU", "GPU")
_OF_RAY: Final = ("node:", "memory", "object_store_memory", "accelerator_type:")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node.

    Attributes:
        id: Ray's id of it.
        address: its address.
        head: whether it is Ray's head node.
        alive: whether Ray counts it as alive.
        resources: the resources that replicas request, as pairs of the used and the total amount.
        labels: its labels, without Ray's own.
    """

    id: str
    address: str
    head: bool
    alive: bool
    resources: Mapping[str, tuple[float, float]]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    """One deployment: a pool, a Model, the ingresses.

    Attributes:
        name: its name, which is also the pool's.
        state: Serve's state of it, such as ``HEALTHY``.
        running: how many replicas run.
        wanted: the target number of replicas.
        others: the numbers of replicas in other states, such as ``STARTING``, by state.
        message: Serve's message, if there is a problem.
        nodes: the addresses of its replicas' nodes.
    """

    name: str
    state: str
    running: int
    wanted: int
    others: Mapping[str, int]
    message: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ApplicationRow:
    """One application; ``model`` is set if it is a model whose Model actor answers."""

    name: str
    state: str
    message: str
    deployments: tuple[DeploymentRow, ...]
    model: ModelFrame | None = None


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The whole deployment.

    Attributes:
        address: the cluster's host and port.
        nodes: its nodes.
        applications: its applications.
        differs: how a config file differs from it; ``None`` if none was given.
        starting: what the engines that are starting on this machine do, in words.
    """

    address: str
    nodes: tuple[NodeRow, ...]
    applications: tuple[ApplicationRow, ...]
    differs: tuple[Difference, ...] | None = None
    starting: tuple[str, ...] = ()


def run(address: str | None, config: Path | None, *, as_json: bool) -> None:
    """Print the status of a cluster.

    Args:
        address: the cluster's host and port; ``None`` for the cluster on this machine.
        config: a config file to compare with the deployment.
        as_json: print it as JSON.

    Raises:
        NothingToShow: there is no cluster, or no Serve on it.
    """
    from app.cli.status_view import render

    silence_ray()
    cluster = connect(address)
    try:
        file = yaml.safe_load(config.read_text()) if config else None
        status = asyncio.run(take(cluster, file))
        if as_json:
            print(json.dumps(asdict(status), indent=2))
        else:
            Console(soft_wrap=True).print(render(status))
    finally:
        ray.shutdown()


async def take(cluster: Cluster, file: Mapping[str, Any] | None) -> ClusterStatus:
    """Return the current status; ``file`` is a config to compare with.

    Raises:
        NothingToShow: there is no Serve.
    """
    details = await asyncio.to_thread(_details, cluster.address)
    models = {model.application: model for model in await _models(cluster)}
    applications = tuple(
        _application(name, one, models.get(name))
        for name, one in sorted((details.get("applications") or {}).items())
    )
    return ClusterStatus(
        address=cluster.address,
        nodes=await asyncio.to_thread(_nodes),
        applications=applications,
        differs=None if file is None else tuple(differences(file, details)),
        starting=tuple(await asyncio.to_thread(Starts(session_logs).progress)),
    )


async def _models(cluster: Cluster) -> list[ModelFrame]:
    try:
        before = await cluster.look()
        await asyncio.sleep(_APART_S)
        return make_frame(await cluster.look(), before)
    except NothingToShow:
        return []


def _details(address: str) -> dict[str, Any]:
    try:
        answer = serve_controller().get_serve_instance_details.remote()
        details: dict[str, Any] = ray.get(answer, timeout=_ANSWER_S)
    except (ValueError, ray.exceptions.RayError):
        raise NothingToShow(f"no Serve on the Ray cluster at {address}") from None
    return details


def _application(name: str, details: Mapping[str, Any], model: ModelFrame | None) -> ApplicationRow:
    deployments = details.get("deployments") or {}
    return ApplicationRow(
        name=name,
        state=_word(details["status"]),
        message=details.get("message") or "",
        deployments=tuple(_deployment(one) for _, one in sorted(deployments.items())),
        model=model,
    )


def _deployment(details: Mapping[str, Any]) -> DeploymentRow:
    replicas: Sequence[Mapping[str, Any]] = details.get("replicas") or ()
    states = [_word(replica["state"]) for replica in replicas]
    others = sorted({state for state in states if state != "RUNNING"})
    return DeploymentRow(
        name=details["name"],
        state=_word(details["status"]),
        running=states.count("RUNNING"),
        wanted=details.get("target_num_replicas") or 0,
        others={state: states.count(state) for state in others},
        message=details.get("message") or "",
        nodes=tuple(sorted({one["node_ip"] for one in replicas if one.get("node_ip")})),
    )


def _word(state: Any) -> str:
    return str(getattr(state, "value", state))


def _nodes() -> tuple[NodeRow, ...]:
    free = available_resources()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    rows = [_node(node, free.get(node["NodeID"], {})) for node in nodes if node["Alive"]]
    return tuple(sorted(rows, key=lambda row: (not row.head, row.address, row.id)))


def _node(node: Mapping[str, Any], free: Mapping[str, float]) -> NodeRow:
    total: Mapping[str, float] = node["Resources"]
    shown = [name for name in total if not name.startswith(_OF_RAY)]
    order = [*(name for name in _SHOWN if name in shown), *sorted(set(shown) - set(_SHOWN))]
    return NodeRow(
        id=node["NodeID"],
        address=node["NodeManagerAddress"],
        head="node:__internal_head__" in total,
        alive=node["Alive"],
        resources={name: (total[name] - free.get(name, 0.0), total[name]) for name in order},
        labels={
            name: value for name, value in node["Labels"].items() if not name.startswith("ray.io/")
        },
    )
