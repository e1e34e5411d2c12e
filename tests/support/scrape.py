"""Reads what Ray exports, as a Prometheus does."""

from __future__ import annotations

from collections import Counter

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import PLAIN
from tests.support.waiting import PATIENCE_S


def sums(name: str, labels: tuple[str, ...], **only: str) -> Counter:
    """Sum a metric over all nodes and processes, by the values of ``labels``."""
    found: Counter = Counter()
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for family in text_string_to_metric_families(
            httpx.get(url, verify=PLAIN, timeout=PATIENCE_S).text
        ):
            for sample in family.samples:
                if sample.name == name and only.items() <= sample.labels.items():
                    found[tuple(sample.labels[label] for label in labels)] += sample.value
    return found
