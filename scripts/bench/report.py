"""The results for people: a table, a verdict on each goal, a file and a picture."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from scripts.bench.summary import Goal, Row, first_tokens, total_change
from scripts.bench.trial import Trial

_COLUMNS = (
    "endpoint", "phase", "tier", "n", "TTFT p50", "TTFT p99", "queue p50", "queue p99",
    "requests/s", "tokens/s", "429", "served as",
)  # fmt: skip
_TEXT_COLUMNS = {"endpoint", "phase", "tier", "served as"}
_COLOURS = {"idle": "#2a9d8f", "priority": "#d1495b", "default": "#30638e"}


def table(rows: Sequence[Row]) -> Table:
    """Return the rows as they are shown."""
    shown = Table(title="Times in milliseconds")
    for column in _COLUMNS:
        shown.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following.endpoint != row.endpoint
        shown.add_row(*cells(row), end_section=last)
    return shown


def cells(row: Row) -> list[str]:
    """Return one row of the table."""
    times = (row.ttft_p50, row.ttft_p99, row.queue_p50, row.queue_p99)
    served = ", ".join(f"{tier} {count}" for tier, count in sorted(row.served.items())) or "-"
    if row.errors:
        served += f"; {row.errors} failed"
    return [
        row.endpoint, row.phase, row.tier, str(row.count), *map(milliseconds, times),
        f"{row.requests_per_s:.2f}", f"{row.tokens_per_s:.1f}", str(row.sheds), served,
    ]  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as it stands in the documentation."""
    lines = [_COLUMNS, ["---" if c in _TEXT_COLUMNS else "--:" for c in _COLUMNS]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (*lines, *map(cells, rows)))


def show(console: Console, trial: Trial, rows: Sequence[Row]) -> None:
    """Print what the table leaves out about one endpoint."""
    console.print(f"\n[bold]{trial.endpoint}[/bold]: {trial.seconds:.0f} s in all; "
                  f"priority came {trial.rate:.2f} times a second; with it all tokens/s together "
                  f"changed by {total_change(rows):+.1%}")  # fmt: skip
    for phase, effort in trial.efforts.items():
        cores = ", ".join(f"{name} {used:.2f}" for name, used in sorted(effort.cores.items()))
        lag = effort.lag_s * 1e3
        console.print(f"  {phase}: cores in use: {cores}; generator late by {lag:.1f} ms (p99)")


def show_goals(console: Console, goals: Sequence[Goal]) -> None:
    """Print what was promised and what was measured."""
    for goal in goals:
        verdict = "[green]met   [/green]" if goal.met else "[red]missed[/red]"
        console.print(f"{verdict} {goal.endpoint}: {goal.what}: {goal.measured}")


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "ray": version("ray"),
    }


def write(
    path: Path, about: dict[str, Any], trials: Sequence[Trial], rows: Sequence[Row],
    goals: Sequence[Goal],
) -> None:  # fmt: skip
    """Write everything as JSON, every first token included."""
    results = {
        **about,
        "rows": [finite(asdict(row)) for row in rows],
        "goals": [asdict(goal) for goal in goals],
        "trials": [_trial(trial) for trial in trials],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def draw(path: Path, title: str, trials: Sequence[Trial]) -> None:
    """Draw how TTFT is distributed, one panel for each endpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(trials), figsize=(5 * len(trials), 3.6), sharex=True, sharey=True, squeeze=False
    )
    for panel, trial in zip(panels[0], trials, strict=True):
        for label, values in _curves(trial).items():
            colour = _COLOURS["idle" if "nothing" in label else label.split(",")[0]]
            panel.ecdf(values, label=label, color=colour, linewidth=2)
        panel.set(xscale="log", xlabel="time to first token, seconds", title=trial.endpoint)
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("share of requests that had it by then")
    panels[0][0].legend(loc="best", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _curves(trial: Trial) -> dict[str, list[float]]:
    windows = {
        "priority, nothing else running": ([trial.idle], "priority"),
        "priority, saturated": ([trial.together], "priority"),
        "default, saturated": ([trial.together], "default"),
    }
    return {
        label: [answer.ttft for answer in first_tokens(trial, *where)]
        for label, where in windows.items()
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "endpoint": trial.endpoint,
        "priority_rate": round(trial.rate, 3),
        "seconds": round(trial.seconds, 1),
        "cores": {phase: effort.cores for phase, effort in trial.efforts.items()},
        "generator_lag_s": {phase: effort.lag_s for phase, effort in trial.efforts.items()},
        "ttft_s": {
            label: [round(value, 4) for value in values] for label, values in _curves(trial).items()
        },
    }


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for JSON, which has no ``nan``."""
    missing = {name for name, v in row.items() if isinstance(v, float) and math.isnan(v)}
    return {name: None if name in missing else value for name, value in row.items()}


def milliseconds(seconds: float) -> str:
    """Return a time as the tables show it."""
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.1f}"
