"""Renders the status of a deployment for ``frontline status``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.cli.diff import Difference
from app.cli.status import ApplicationRow, ClusterStatus, DeploymentRow, NodeRow
from app.cli.top import plain_table, render_model
from app.contracts.start import StartFailure, find_failure

_WELL = ("RUNNING", "HEALTHY")


def render(status: ClusterStatus) -> RenderableType:
    """Return the rendered status."""
    parts: list[RenderableType] = [Text(f"Ray cluster {status.address}", style="dim")]
    parts += [_nodes(status.nodes), Text(), _deployments(status.applications)]
    for application in status.applications:
        parts += _troubles(application)
    parts += [Text(f" starting: {one}") for one in status.starting]
    for application in status.applications:
        if application.model is not None:
            parts += [Text(), *render_model(application.model)]
    if status.differs is not None:
        parts += [Text(), *_differences(status.differs)]
    return Group(*parts)


def _nodes(nodes: Sequence[NodeRow]) -> Table:
    table = plain_table(
        "node", "address", "used", "labels", left=("node", "address", "used", "labels")
    )
    for node in nodes:
        used = ", ".join(f"{name} {a:g}/{b:g}" for name, (a, b) in node.resources.items())
        labels = ", ".join(f"{name}={value}" for name, value in node.labels.items())
        head = " (head)" if node.head else ""
        table.add_row(
            Text(node.id[:8] + head), node.address, Text(used or "-"), Text(labels or "-")
        )
    return table


def _deployments(applications: Sequence[ApplicationRow]) -> Table:
    columns = ("application", "deployment", "state", "replicas", "on")
    table = plain_table(*columns, left=columns)
    for application in applications:
        state = _state(application.state)
        table.add_row(Text(application.name, style="bold"), "", state, "", "")
        for one in application.deployments:
            table.add_row(
                "", Text(one.name), _state(one.state), _replicas(one), ", ".join(one.nodes) or "-"
            )
    return table


def _replicas(one: DeploymentRow) -> Text:
    others = "".join(f", {count} {state.lower()}" for state, count in one.others.items())
    short = one.running < one.wanted
    return Text(f"{one.running}/{one.wanted}{others}", style="yellow" if short else "")


def _state(state: str) -> Text:
    return Text(state, style="" if state in _WELL else "yellow")


def _troubles(application: ApplicationRow) -> Iterator[RenderableType]:
    for pool, missing in application.model.missing.items() if application.model else ():
        words = f" {application.name}: no node offers what pool {pool} asks for: {missing}"
        yield Text(words, style="red")
    for adapter, why in application.model.unloaded.items() if application.model else ():
        words = f" {application.name}: the adapter {adapter} is not loaded, and is tried again: "
        yield Text(words + why, style="red")
    failures = _failures(application)
    for failure in failures.values():
        yield Text(f" {application.name}: {failure.report()}", style="red")
    if application.state not in _WELL and application.message and not failures:
        yield Text(f" {application.name}: {_first_line(application.message)}", style="yellow")
    for one in application.deployments:
        if one.state not in _WELL and one.message and one.name not in failures:
            words = f" {application.name}, {one.name}: {_first_line(one.message)}"
            yield Text(words, style="yellow")


def _failures(application: ApplicationRow) -> dict[str, StartFailure]:
    """Return why engines failed to start, by pool: from the Model, or from Serve's messages."""
    found = {one.name: find_failure(one.message) for one in application.deployments}
    told = application.model.failed if application.model is not None else {}
    return {name: failure for name, failure in found.items() if failure} | dict(told)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300]


def _differences(found: Sequence[Difference]) -> Iterator[RenderableType]:
    if not found:
        yield Text("The file is what is deployed.")
        return
    table = plain_table("key", "file", "deployed", left=("key", "file", "deployed"))
    for one in found:
        table.add_row(
            Text(one.key, style="yellow"), Text(_shown(one.file)), Text(_shown(one.deployed))
        )
    yield table


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
