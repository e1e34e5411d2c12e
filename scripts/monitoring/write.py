"""Write configs/monitoring and the tables of docs/monitoring.md.

python scripts/monitoring/write.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from app.observe.catalogue import METRICS, Metric  # noqa: E402
from deployments.engines.registry import ADAPTERS, adapter_named  # noqa: E402
from scripts.monitoring.dashboard import dashboard  # noqa: E402
from scripts.monitoring.rules import Windows, alerts, rules_file  # noqa: E402
from scripts.monitoring.scrape import (  # noqa: E402
    grafana_dashboards,
    grafana_datasource,
    kubernetes,
    prometheus,
)

FOLDER: Final = REPO / "configs" / "monitoring"
PAGE: Final = REPO / "docs" / "monitoring.md"
_MADE: Final = "# Made by scripts/monitoring/write.py; do not edit.\n"


def files() -> dict[str, str]:
    """Return the text of every file in configs/monitoring, by its path there."""
    rules = rules_file(Windows())
    return {
        "prometheus.yml": _yaml(prometheus()),
        "rules.yml": _yaml(rules),
        "kubernetes.yaml": _yaml(*kubernetes(rules)),
        "grafana/frontline.json": json.dumps(dashboard(), indent=1) + "\n",
        "grafana/provisioning/datasources/prometheus.yaml": _yaml(grafana_datasource()),
        "grafana/provisioning/dashboards/frontline.yaml": _yaml(grafana_dashboards()),
    }


def engine_metrics() -> list[Metric]:
    """Return the engines' metrics that are relayed."""
    return [metric.relayed for name in ADAPTERS for metric in adapter_named(name).metrics]


def page(text: str) -> str:
    """Return docs/monitoring.md with its generated parts made anew."""
    parts = {
        "metrics": "\n".join(_table(METRICS)),
        "engines": "\n".join(_table(engine_metrics())),
        "alerts": "\n".join(_alerts()),
    }
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by scripts/monitoring/write.py -->\n", "<!-- end -->"
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{part}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def _table(metrics: Iterable[Metric]) -> Iterator[str]:
    yield "| metric | kind | labels | exported by | meaning |"
    yield "|---|---|---|---|---|"
    for one in metrics:
        labels = ", ".join(f"`{label}`" for label in one.labels) or "none"
        yield f"| `{one.name}` | {one.kind} | {labels} | {one.source} | {one.text} |"


def _alerts() -> Iterator[str]:
    for alert in alerts(Windows()):
        lasting = f", for {alert.lasting}" if alert.lasting else ""
        yield f"### {alert.name}\n"
        yield f"`{alert.severity}`: `{alert.expr}`{lasting}.\n"
        yield f"{alert.todo}\n"


def _yaml(*documents: dict[str, Any]) -> str:
    return _MADE + yaml.safe_dump_all(documents, sort_keys=False, width=100)


if __name__ == "__main__":
    for name, text in files().items():
        target = FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    if PAGE.exists():
        PAGE.write_text(page(PAGE.read_text()))
