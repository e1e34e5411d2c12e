#!/usr/bin/env python
"""How near many ingresses with credits come to one queue: a discrete-event simulation.

Drives the very code that serves (`app.flow.scheduler`, `app.flow.credits`,
`app.flow.allocation.allocator`) with a simulated clock, network and engines, at scales that no test
machine has. Each scenario is run twice with the same requests: as the ideal, one queue that holds
every slot, and with as many ingresses as it says, which renew their credits over a network that
takes time. A request's wait lasts from its arrival at an ingress until an engine has a slot for it.

    scripts/bench/simulate.py                          every scenario
    scripts/bench/simulate.py --only "8 x 100"         those whose name contains this
    scripts/bench/simulate.py --no-wake               renewals on time only

Run it in the tests' environment: `FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.config.queue import QueueSettings
from app.core.tiers import Tier
from scripts.bench.progress import steps
from scripts.bench.simulation import Outcome, Scenario, Simulation

LOADS = (0.9, 1.5, 3.0)
SIZES = ((1, 20, 1500.0), (8, 20, 1500.0), (8, 100, 400.0), (64, 2000, 60.0))
"""Ingresses, replicas, and for how many seconds requests come."""
GOAL = 1.1
"""Priority's p99 wait is to be at most so many times the ideal one, at eight ingresses."""

Result = tuple[Scenario, Outcome, Outcome]
_COLUMNS = (
    "scenario",
    "queue",
    *(tier.value for tier in Tier),
    "busy",
    "renewals/s",
    "priority p99",
)


def scenarios(priority: float, wake: bool) -> list[Scenario]:
    """Return every scenario."""
    return [
        Scenario(ingresses, replicas, load, bursty, seconds, priority=priority, wake=wake)
        for ingresses, replicas, seconds in SIZES
        for bursty in (False, True)
        for load in LOADS
    ]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Return the table: two rows for each scenario."""
    lines = []
    for scenario, ideal, ours in results:
        for name, label, outcome in ((scenario.name, "ideal", ideal), ("", "credits", ours)):
            lines.append(
                [name, label, *(_waits(outcome, tier) for tier in Tier), f"{outcome.busy:.1%}"]
            )
            lines[-1] += [f"{ours.renewals:.1f}", distance(ours, ideal)] if name == "" else ["", ""]
    return lines


def _waits(outcome: Outcome, tier: Tier) -> str:
    p50, p99 = outcome.wait(tier, 0.5), outcome.wait(tier, 0.99)
    if math.isnan(p50):
        return f"-, {outcome.shed_share(tier):.0%}"
    return f"{p50:.2f} / {p99:.2f}, {outcome.shed_share(tier):.0%}"


def distance(ours: Outcome, ideal: Outcome) -> str:
    """Say how far the priority p99 wait is from the ideal one."""
    mine, best = ours.wait(Tier.PRIORITY, 0.99), ideal.wait(Tier.PRIORITY, 0.99)
    if mine <= GOAL * best:
        return "within 10%"
    share = f" ({mine / best - 1:+.0%})" if best else ""
    return f"{(mine - best) * 1000:+.0f} ms{share}"


def markdown(results: Sequence[Result]) -> str:
    """Return the table as it stands in the documentation."""
    lines = [list(_COLUMNS), ["---"] * 5 + ["--:"] * 3, *rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(console: Console, results: Sequence[Result]) -> None:
    """Print the table."""
    shown = Table(title="Wait p50 / p99 in seconds, and the part that was shed")
    for column in _COLUMNS:
        shown.add_column(column, no_wrap=True)
    for line in rows(results):
        shown.add_row(*line, end_section=line[1] == "credits")
    console.print(shown)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Plot the distribution of waits by tier, the ideal ones dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(results))
    lines = math.ceil(len(results) / columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 2.8 * lines), squeeze=False, sharex=True, sharey=True
    )
    colours = dict(zip(Tier, ("#d1495b", "#30638e", "#8d99ae"), strict=True))
    for panel, (scenario, ideal, ours) in zip(panels.flat, results, strict=False):
        for outcome, style in ((ideal, "--"), (ours, "-")):
            for tier, colour in colours.items():
                if waits := [max(wait, 0.001) for wait in outcome.waits[tier]]:
                    label = tier.value if outcome is ours else None
                    panel.ecdf(waits, linestyle=style, color=colour, label=label)
        panel.set(title=scenario.name, xscale="log", xlim=(0.001, 700), ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.supxlabel("wait in seconds (ideal queue dashed)")
    figure.supylabel("part of those served")
    figure.tight_layout()
    figure.savefig(path, dpi=70)


def main(
    only: Annotated[str, typer.Option(help="Run scenarios whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench"),
    priority: Annotated[float, typer.Option(help="Part of the requests that are priority.")] = 0.1,
    wake: Annotated[bool, typer.Option(help="Whether the Model wakes ingresses.")] = True,
) -> None:
    """Simulate, and print waits by tier beside those of the ideal queue."""
    settings = QueueSettings()
    chosen = [one for one in scenarios(priority, wake) if only in one.name]
    if not chosen:
        raise typer.BadParameter("no scenario has that in its name", param_hint="--only")
    results = []
    for scenario in steps(chosen, "simulating"):
        ideal = Simulation(scenario, settings, ideal=True).run()
        results.append((scenario, ideal, Simulation(scenario, settings, ideal=False).run()))
    show(Console(width=150), results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "simulate.md").write_text(markdown(results) + "\n")
    draw(out / "simulate.png", results)


if __name__ == "__main__":
    typer.run(main)
