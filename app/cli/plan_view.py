"""Renders a plan for ``frontline plan``: as text that can be copied, and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from app.cli.plan import FrontPlan, ModelPlan, PoolPlan, Replicas
from app.contracts.launch import OpenPort, RankPlan

_NAMES: Final = 15
"""Width of the names of entries, in columns."""


def to_json(models: Sequence[ModelPlan], front: FrontPlan) -> dict[str, Any]:
    """Return a plan as plain values; ``app.cli.plan`` explains them."""
    plain = [asdict(model) for model in models]
    for one, model in zip(plain, models, strict=True):
        one["queue"] = model.queue.model_dump(mode="json")
        one["scaling"] = model.scaling.model_dump(mode="json")
    return {"models": plain, "front": asdict(front)}


def to_text(models: Sequence[ModelPlan], front: FrontPlan | None = None) -> str:
    """Return a plan as text: one paragraph per model and pool, and one for HAProxy."""
    lines = [line for model in models for line in _model(model)]
    if front is not None:
        lines += [*_front(front), ""]
    return "\n".join(lines)


def _front(front: FrontPlan) -> Iterator[str]:
    yield "HAProxy, of each node with an ingress"
    yield from _entry("requests", [f"up to {front.requests:,} run or wait at once"])
    yield from _entry(
        "connections",
        [
            f"RAY_SERVE_HAPROXY_MAXCONN of at least {front.maxconn}; {_maxconn_here(front)}",
            f"{front.descriptors:,} open files at least (ulimit -Hn)",
        ],
    )


def _maxconn_here(front: FrontPlan) -> str:
    if front.maxconn_here is None:
        return "it is not set here (scripts/activate sets it)"
    enough = "" if front.maxconn_here >= front.maxconn else ", which is too low"
    return f"it is {front.maxconn_here} here{enough}"


def _model(model: ModelPlan) -> Iterator[str]:
    flex = "offered" if model.flex else "not offered"
    yield f"{model.id}  (application {model.application}; priority: {model.priority}, flex {flex})"
    for pool in model.pools:
        yield ""
        yield from _pool(pool)
    yield ""


def _pool(pool: PoolPlan) -> Iterator[str]:
    launch = pool.launch
    slots = f"slots that fit (at most {pool.slots})" if pool.slots_auto else f"{pool.slots} slots"
    yield f"  {pool.name}: {launch.engine}, {slots}, {_count(pool.replicas)}"
    yield from _entry("ray", [f"{name}: {_value(value)}" for name, value in pool.ray.items()])
    yield from _entry("priority", [pool.priority])
    yield from _entry("command", _command(launch.command))
    yield from _entry("environment", _assignments(launch.environment))
    yield from _entry("files", [f"{option} {text}" for option, text in launch.files.items()])
    yield from _entry("log", [launch.log])
    for port in launch.opens:
        yield from _entry(port.name, _port(port))
    for rank in launch.ranks:
        yield from _rank(rank)


def _port(port: OpenPort) -> list[str]:
    paths = [f"{port.method} {', '.join(port.paths)}"] if port.paths else []
    return [f"port {port.port} of {port.where}", *paths, f"for {port.lets_in}"]


def _rank(rank: RankPlan) -> Iterator[str]:
    yield from _entry(f"part {rank.rank}", [f"on NODE_{rank.rank}, beside no other part"])
    yield from _entry("  command", _command(rank.command))
    yield from _entry("  environment", _assignments(rank.environment))
    yield from _entry("  log", [rank.log])


def _count(replicas: Replicas) -> str:
    if replicas.least == replicas.most:
        return "1 replica" if replicas.most == 1 else f"{replicas.most} replicas"
    return f"{replicas.least} to {replicas.most} replicas"


def _entry(name: str, lines: Sequence[str]) -> Iterator[str]:
    for place, line in enumerate(lines):
        yield f"    {name if place == 0 else '':{_NAMES}}{line}"


def _command(words: Sequence[str]) -> list[str]:
    """Return a command line for a shell, with one option and its values per line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    joined = [" ".join(line) for line in lines]
    return [f"{line} \\" for line in joined[:-1]] + joined[-1:]


def _assignments(environment: Mapping[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items())]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
