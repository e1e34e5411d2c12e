"""The results of bursts for people: a table, a verdict on each goal, a file and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench.burst import BurstTrial
from scripts.bench.burst_summary import BurstRow, ttfts
from scripts.bench.report import finite, milliseconds
from scripts.bench.summary import Goal

_COLUMNS = (
    "endpoint", "idle p50", "idle p99", "n", "burst p50", "burst p99", "p99 / idle",
    "default alone", "default with bursts", "all tiers with bursts", "time of bursts",
    "default lost beyond it", "met by a burst", "whole",
    "longest pause", "preemptions", "failed", "429", "served below",
)  # fmt: skip


def cells(row: BurstRow) -> list[str]:
    """Return one row of the table."""
    return [
        row.endpoint,
        milliseconds(row.idle_p50),
        milliseconds(row.idle_p99),
        str(row.count),
        milliseconds(row.ttft_p50),
        milliseconds(row.ttft_p99),
        f"{row.ttft_p99 / row.idle_p99:.2f} x",
        f"{row.default_alone:.1f}",
        f"{row.default_with:.1f} ({row.default_with / row.default_alone - 1:+.1%})",
        f"{row.all_with:.1f} ({row.all_with / row.all_alone - 1:+.1%})",
        f"{row.taken:.1%}",
        f"{row.lost:.1%}",
        str(row.met),
        str(row.whole),
        milliseconds(row.longest_pause),
        "-" if row.preemptions is None else f"{row.preemptions:.0f}",
        str(row.errors),
        str(row.sheds),
        str(row.lowered),
    ]


def table(rows: Sequence[BurstRow]) -> Table:
    """Return the rows as they are shown, one endpoint a column: there are many figures."""
    shown = Table(title="Times in milliseconds, throughput in tokens a second")
    for column in ("", *(row.endpoint for row in rows)):
        shown.add_column(column, justify="right" if column else "left")
    by_row = [cells(row) for row in rows]
    for number, name in enumerate(_COLUMNS[1:], start=1):
        shown.add_row(name, *(one[number] for one in by_row))
    return shown


def markdown(rows: Sequence[BurstRow]) -> str:
    """Return the table as it stands in the documentation, one endpoint a column."""
    by_endpoint = zip(_COLUMNS, *map(cells, rows), strict=True)
    [_, *names], *figures = (list(line) for line in by_endpoint)
    lines = [["", *names], ["---", *["--:"] * len(names)], *figures]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals_markdown(goals: Sequence[Goal]) -> str:
    """Return the verdicts as they stand in the documentation."""
    lines = ["| endpoint | goal | measured | |", "| --- | --- | --- | --- |"]
    for goal in goals:
        verdict = "met" if goal.met else "**missed**"
        lines.append(f"| {goal.endpoint} | {goal.what} | {goal.measured} | {verdict} |")
    return "\n".join(lines)


def show(console: Console, trials: Sequence[BurstTrial]) -> None:
    """Print what the table leaves out."""
    for trial in trials:
        lag = trial.lag_s * 1e3
        console.print(f"{trial.endpoint}: generator late by {lag:.1f} ms (p99, worst window)")


def write(
    path: Path, about: dict[str, Any], trials: Sequence[BurstTrial], rows: Sequence[BurstRow],
    goals: Sequence[Goal],
) -> None:  # fmt: skip
    """Write everything as JSON, every first token of a burst included."""
    results = {
        **about,
        "rows": [finite(asdict(row)) for row in rows],
        "goals": [asdict(goal) for goal in goals],
        "trials": [
            {
                "endpoint": trial.endpoint,
                "generator_lag_s": trial.lag_s,
                "ttft_s": {
                    "idle": [round(value, 4) for value in ttfts(trial, trial.idle)],
                    "saturated": [round(value, 4) for value in ttfts(trial, trial.bursts)],
                },
            }
            for trial in trials
        ],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def draw(path: Path, title: str, trials: Sequence[BurstTrial]) -> None:
    """Draw how the TTFT of bursts is distributed at each endpoint, idle (dashed) and saturated."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "frontline"
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 4))
    for number, trial in enumerate(trials):
        for windows, style in ((trial.idle, "--"), (trial.bursts, "-")):
            if values := ttfts(trial, windows):
                label = trial.endpoint if style == "-" else None
                panel.ecdf(values, label=label, color=f"C{number}", linestyle=style, linewidth=2)
    panel.set(xscale="log", xlabel="time to first token of a burst, seconds (dashed: idle engine)")
    panel.set_ylabel("share of requests that had it by then")
    panel.grid(alpha=0.3, which="both")
    panel.legend(loc="best", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    # Without times and random ids: the same figures make the same file.
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
