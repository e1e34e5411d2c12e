"""How Prometheus finds Ray's metrics: by Ray's own list, or by pods on Kubernetes. Pure."""

from __future__ import annotations

from typing import Any, Final

RAYS_LIST: Final = "/tmp/ray/prom_metrics_service_discovery.json"
"""Ray's head node keeps it up to date. It names every node's port."""


def prometheus(
    targets: str = RAYS_LIST, rules: str = "rules.yml", interval: str = "10s"
) -> dict[str, Any]:
    """Return the contents of a prometheus.yml; Ray exports every ten seconds."""
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [rules],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [targets]}]}],
    }


def kubernetes(rules: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the Prometheus operator's objects: one that scrapes Ray's pods, and the rules."""
    labels = {"app.kubernetes.io/part-of": "frontline"}
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": {"name": "frontline", "labels": labels},
            "spec": {
                "jobLabel": "ray.io/cluster",
                "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
                "podMetricsEndpoints": [
                    {"port": "metrics", "path": "/metrics", "interval": "10s"},
                ],
            },
        },
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "frontline", "labels": labels},
            "spec": rules,
        },
    ]


def grafana_datasource() -> dict[str, Any]:
    """Return Grafana's provisioning of a local Prometheus; the variable names its port."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "uid": "prometheus",
                "type": "prometheus",
                "access": "proxy",
                "url": "http://127.0.0.1:${FRONTLINE_PROMETHEUS_PORT}",
                "isDefault": True,
            }
        ],
    }


def grafana_dashboards() -> dict[str, Any]:
    """Return Grafana's provisioning of the dashboard; the variable names this folder."""
    options = {"path": "${FRONTLINE_MONITORING}/grafana"}
    return {
        "apiVersion": 1,
        "providers": [{"name": "frontline", "type": "file", "options": options}],
    }
