"""Snapshots of models, as pages get them."""

from app.config.model import ModelSettings
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.core.dialect import Dialect, Route
from deployments.engines.base import LOW_FIRST

RATE_CARD = {"input": "0.02", "cached_input": "0.01", "output": "0.04"}


def replica(number=1, engine="vllm", *, native=True, preempts=True, generates=True, pool=None):
    """A replica of 8 slots."""
    dialect = Dialect(
        engine,
        priority_values=LOW_FIRST,
        priority_routes=frozenset(Route) if native else frozenset(),
        preempts=native and preempts,
        generates=generates,
    )
    name = f"replica-{number}"
    return ReplicaStatus(name, pool or engine, "http://engine", "secret", 8, "1.2.3", 4096, dialect)


def snapshot(model, *replicas, settings=None, aliases=(), **more):
    """A model with these replicas."""
    loaded = ModelSettings.load({"rate_card": RATE_CARD, **(settings or {})}, "user_config")
    return ModelSnapshot(model, aliases, "owner", 0, loaded, replicas, **more)
