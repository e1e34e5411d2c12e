"""The engines' own metrics that replicas relay to Ray's exporter, and how they are read. Pure.

Engines run as child processes with a key, so nobody else can read their ``/metrics``. A relayed
metric keeps the engine's name, except that Ray allows no colon: ``vllm:num_requests_running``
becomes ``vllm_num_requests_running``, as when vLLM runs inside a Ray actor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample as Line

from app.contracts.traffic import Histogram
from app.observe.catalogue import Kind, Metric, Source


class Role(Enum):
    """What a metric of an engine tells; engines have different names for the same."""

    RUNNING = (Kind.GAUGE, "Requests that the engine runs.")
    WAITING = (Kind.GAUGE, "Requests that wait inside the engine.")
    SUSPENDED = (Kind.GAUGE, "Requests that the engine has suspended.")
    KV_USE = (Kind.GAUGE, "Share of the KV cache in use, 0 to 1.")
    HIT_RATE = (Kind.GAUGE, "Share of the blocks of prompts that were cached, 0 to 1.")
    PREEMPTIONS = (Kind.COUNTER, "Times that the engine suspended a running request.")
    PROMPT_TOKENS = (Kind.COUNTER, "Prompt tokens looked up in the prefix cache.")
    CACHED_TOKENS = (Kind.COUNTER, "Prompt tokens found in the prefix cache.")
    QUEUE_TIME = (Kind.HISTOGRAM, "Time that requests waited inside the engine, in seconds.")
    TTFT = (Kind.HISTOGRAM, "Time to the first token inside the engine, in seconds.")


_SHARES: Final = frozenset({Role.KV_USE, Role.HIT_RATE})


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """One metric of an engine.

    Attributes:
        name: the engine's own name, with ``_total`` for a counter.
        role: what it tells.
    """

    name: str
    role: Role

    @property
    def kind(self) -> Kind:
        """Its kind."""
        return self.role.value[0]

    @property
    def joined(self) -> str:
        """How series are combined that differ in the engine's own labels, such as its rank."""
        return "max" if self.role in _SHARES else "sum"

    @property
    def relayed(self) -> Metric:
        """The metric that a replica exports."""
        name = self.name.replace(":", "_")
        labels = ("model_name", "pool")
        text = self.role.value[1]
        return Metric(name, self.kind, labels, Source.REPLICA, text, (), self.joined)


def engine_metrics(names: Mapping[Role, str]) -> tuple[EngineMetric, ...]:
    """Return the metrics of an engine, given its own names."""
    return tuple(EngineMetric(name, role) for role, name in names.items())


class Reading(NamedTuple):
    """The present value of one of an engine's metrics."""

    metric: EngineMetric
    value: float | Histogram


def read_metrics(text: str, wanted: Iterable[EngineMetric]) -> Iterator[Reading]:
    """Yield what an engine's ``/metrics`` says of the metrics that are wanted and there.

    A counter that is not there yet is 0, if others are there: SGLang shows its counters of
    suspended requests and cached tokens only from their first event on, and Prometheus would not
    count that one.

    Raises:
        ValueError: the text is not Prometheus' format.
    """
    metrics = tuple(wanted)
    # Most of it is not wanted, and a line takes 20 us to parse.
    names = tuple(metric.name for metric in metrics)
    kept = (line for line in text.splitlines() if line.startswith(names))
    lines: dict[str, list[Line]] = {}
    for family in text_string_to_metric_families("\n".join([*kept, ""])):
        for line in family.samples:
            lines.setdefault(line.name, []).append(line)
    for metric in metrics:
        value = (
            _histogram(lines, metric.name)
            if metric.kind is Kind.HISTOGRAM
            else _number(lines.get(metric.name, ()), metric.joined)
        )
        if value is None and metric.kind is Kind.COUNTER and lines:
            value = 0.0
        if value is not None:
            yield Reading(metric, value)


def _number(lines: Iterable[Line], joined: str) -> float | None:
    values = [line.value for line in lines if math.isfinite(line.value)]
    if not values:
        return None
    return max(values) if joined == "max" else sum(values)


def _histogram(lines: dict[str, list[Line]], name: str) -> Histogram | None:
    below: dict[float, float] = {}
    for line in lines.get(f"{name}_bucket", ()):
        bound = float(line.labels["le"])
        below[bound] = below.get(bound, 0.0) + line.value
    bounds = tuple(sorted(bound for bound in below if bound < math.inf))
    if not bounds or math.inf not in below:
        return None
    histogram = Histogram(bounds)
    totals = [int(below[bound]) for bound in (*bounds, math.inf)]
    histogram.counts = [after - before for before, after in zip([0, *totals], totals, strict=False)]
    histogram.total = _number(lines.get(f"{name}_sum", ()), "sum") or 0.0
    return histogram
