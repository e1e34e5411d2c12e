#!/usr/bin/env python
"""Autoscaling by simulation: Frontline's policy, Ray Serve's own, a fixed fleet, and foresight.

Each trace (`scripts/bench/traces.py`) is played to each policy (`scripts/bench/policies.py`) on the
same simulated engines and line (`scripts/bench/fleet.py`). Frontline's is the code that decides in
production, with its default settings. Serve's is the installed Ray's own code, with its default
delays; which `target_ongoing_requests` suits is not known beforehand, so it is run with several.
What the goal would ask of anybody shows by *ideal*: Frontline's plan for one who knows every rate.

    scripts/bench/autoscale.py                         every trace: about six minutes of one core
    scripts/bench/autoscale.py --only "burst, 20"      those whose name contains this
    scripts/bench/autoscale.py --seeds 5               what of it is chance: five of each trace
    scripts/bench/autoscale.py --trace azure --data DIR     real traffic: see docs/autoscaling.md

Run it in the tests' environment: `FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.config.queue import QueueSettings
from app.config.scaling import ScalingSettings
from scripts.bench import autoscale_hours, autoscale_traces
from scripts.bench.fleet import Fleet, Outcome, Policy, Simulation
from scripts.bench.policies import Fixed, Foresight, PriorityAware, ServesOwn
from scripts.bench.progress import steps
from scripts.bench.traces import MIX, SLOTS, Trace, traces

SLO_S = 1.0
"""A priority request whose first token comes later, or that is shed, is a violation."""
SERVE_TARGETS = (0.4, 0.55, 0.7, 0.85, 1.0)
"""Serve's `target_ongoing_requests`, as shares of a replica's slots."""
MIDDLE = 0.7
"""The one to compare with: Serve's own defaults (2 of 5) are 0.4, a full replica is 1. It leaves
the room for bursts that one leaves who has to choose without knowing them."""
FEWER_HOURS, FEWER_VIOLATIONS, SAME = 0.30, 5.0, 1.02
OURS, IDEAL, FIXED = "Frontline", "ideal", "fixed"


@dataclass(frozen=True)
class Row:
    """One policy on one trace."""

    trace: str
    policy: str
    replica_hours: float
    priority_ttft_p50_s: float
    priority_ttft_p99_s: float
    priority_requests: int
    violations: int
    default_p99_wait_s: float
    default_requests: int
    default_sheds: int
    flex_requests: int
    flex_sheds: int
    history: list[tuple[float, int, int]]


def serves(share: float) -> str:
    """Return how a policy of Serve's is called."""
    return f"Serve {share:.0%}"


def policies(trace: Trace) -> list[str]:
    """Return the names of the policies to try on a trace."""
    return [FIXED, *map(serves, SERVE_TARGETS), OURS, IDEAL]


def play(trace: Trace, name: str, least: int = 1, flex_extra: int = 0) -> Row:
    """Play a trace to one policy.

    Args:
        trace: what comes.
        name: of the policy.
        least: how many replicas Frontline's has at the least.
        flex_extra: how many it may add for flex.
    """
    most = max(4, 2 * trace.replicas)
    # What the fixed fleet has is what the highest mean load takes at the middle target.
    peak = math.ceil(trace.replicas / MIDDLE)
    first = sum(share * trace.level(rank, 0.0) for rank, share in enumerate(MIX))
    initial = peak if name == FIXED else max(1, math.ceil(first * trace.replicas / MIDDLE))
    policy: Policy
    if name == FIXED:
        policy = Fixed(peak)
    elif name == OURS:
        settings = ScalingSettings(flex_extra_replicas=flex_extra)
        policy = PriorityAware(settings, most, least)
    elif name == IDEAL:
        headroom = QueueSettings().headroom_share(preempts=False)
        policy = Foresight(trace, ScalingSettings(), most, headroom)
    else:
        [share] = [share for share in SERVE_TARGETS if serves(share) == name]
        policy = ServesOwn(share * SLOTS, most)
    fleet = Fleet(SLOTS, trace.start_s, initial, most, trace.control_s)
    outcome = Simulation(fleet, policy, QueueSettings()).run(trace.requests(), trace.seconds)
    return _row(trace, name, outcome, fleet.prefill_s)


def _row(trace: Trace, name: str, outcome: Outcome, prefill_s: float) -> Row:
    late = sum(wait + prefill_s > SLO_S for wait in outcome.waits[0]) + outcome.shed[0]
    counts = [len(w) + s for w, s in zip(outcome.waits, outcome.shed, strict=True)]
    every = max(1, len(outcome.history) // 400)
    return Row(
        trace=trace.name,
        policy=name,
        replica_hours=outcome.replica_s / 3600,
        priority_ttft_p50_s=outcome.quantile(0, 0.5) + prefill_s,
        priority_ttft_p99_s=outcome.quantile(0, 0.99) + prefill_s,
        priority_requests=counts[0],
        violations=late,
        default_p99_wait_s=outcome.quantile(1, 0.99),
        default_requests=counts[1],
        default_sheds=outcome.shed[1],
        flex_requests=counts[2],
        flex_sheds=outcome.shed[2],
        history=outcome.history[::every],
    )


def verdict(ours: Row, other: Row) -> tuple[bool, str]:
    """Return whether the goal is met against another policy, and by what."""
    saved = 1 - ours.replica_hours / other.replica_hours
    words = f"{-saved:+.0%} hours, {ours.violations} against {other.violations} violations"
    no_more = ours.violations <= other.violations
    cheaper = saved >= FEWER_HOURS and no_more
    same = ours.replica_hours <= SAME * other.replica_hours
    fewer = other.violations > 0 and FEWER_VIOLATIONS * ours.violations <= other.violations
    return cheaper or (same and fewer), words


def hindsight(rows: Sequence[Row]) -> Row | None:
    """Return the cheapest of Serve's that has no more violations than ours, if there is one."""
    [ours] = [row for row in rows if row.policy == OURS]
    good = [r for r in rows if r.policy.startswith("Serve") and r.violations <= ours.violations]
    return min(good, key=lambda row: row.replica_hours, default=None)


def table(rows: Sequence[Row]) -> str:
    """Return the table as it stands in the documentation."""
    head = (
        "| trace | policy | replica-hours | priority TTFT p99 | violations | default wait p99 | "
        "default sheds | flex sheds |"
    )
    lines = [head, "| --- | --- | --: | --: | --: | --: | --: | --: |"]
    shown = (FIXED, serves(MIDDLE), OURS, IDEAL)
    lines += [
        f"| {r.trace if r.policy == FIXED else ''} | {r.policy} | {r.replica_hours:.1f} | "
        f"{r.priority_ttft_p99_s:.2f} s | {r.violations} ({r.violations / r.priority_requests:.2%})"
        f" | {r.default_p99_wait_s:.1f} s | {r.default_sheds / r.default_requests:.1%} | "
        f"{r.flex_sheds / r.flex_requests:.0%} |"
        for r in rows
        if r.policy in shown
    ]
    return "\n".join(lines)


def goals(by_trace: Sequence[Sequence[Row]]) -> str:
    """Return what became of the goals, by trace."""
    lines = [
        f"| trace | Frontline against {serves(MIDDLE)} | goal | ideal against {serves(MIDDLE)} | "
        "goal | the cheapest of Serve's that has no more violations |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rows in by_trace:
        named = {row.policy: row for row in rows}
        met, words = verdict(named[OURS], named[serves(MIDDLE)])
        within, ideally = verdict(named[IDEAL], named[serves(MIDDLE)])
        best = hindsight(rows)
        other = "none"
        if best is not None:
            change = named[OURS].replica_hours / best.replica_hours - 1
            other = f"{best.policy}: {best.violations} violations; Frontline {change:+.0%} hours"
        lines.append(
            f"| {rows[0].trace} | {words} | {'met' if met else '**missed**'} | {ideally} | "
            f"{'met' if within else 'missed'} | {other} |"
        )
    return "\n".join(lines)


def chances(by_trace: Sequence[Sequence[Sequence[Row]]]) -> str:
    """Return what became of the goals with several seeds, by trace and then by seed."""
    lines = [
        f"| trace | hours against {serves(MIDDLE)}: median (least to most) | violations, by seed | "
        "goal met | ideal | goal met |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for seeds in by_trace:
        cells = [seeds[0][0].trace]
        for policy in (OURS, IDEAL):
            saved, met, counts = [], 0, []
            for rows in seeds:
                named = {row.policy: row for row in rows}
                one, other = named[policy], named[serves(MIDDLE)]
                saved.append(one.replica_hours / other.replica_hours - 1)
                met += verdict(one, other)[0]
                counts.append(f"{one.violations}:{other.violations}")
            cells.append(f"{median(saved):+.0%} ({min(saved):+.0%} to {max(saved):+.0%})")
            cells += [", ".join(counts)] if policy == OURS else []
            cells.append(f"{met} of {len(seeds)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def try_seeds(chosen: Sequence[Trace], seeds: int, least: int, flex_extra: int, jobs: int) -> str:
    """Play each trace with the first seeds, and return what of its outcome is chance."""
    names = (serves(MIDDLE), OURS, IDEAL)
    runs = [
        (replace(trace, seed=seed), name, least, flex_extra)
        for trace in chosen
        for seed in range(1, seeds + 1)
        for name in names
    ]
    with ProcessPoolExecutor(jobs) as pool:
        played = pool.map(play, *zip(*runs, strict=True))
        rows = iter(list(steps(played, "seeds", total=len(runs))))
    return chances([[[next(rows) for _ in names] for _ in range(seeds)] for _ in chosen])


def draw(path: Path, by_trace: Sequence[Sequence[Row]]) -> None:
    """Plot replicas over time, and what all of Serve's targets cost and lead to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    lines = math.ceil(len(by_trace) / columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 2.6 * lines), squeeze=False
    )
    colours = {FIXED: "#8d99ae", serves(MIDDLE): "#30638e", OURS: "#d1495b"}
    for panel, rows in zip(panels.flat, by_trace, strict=False):
        for row in rows:
            if row.policy in colours:
                hours = [now / 3600 for now, _, _ in row.history]
                replicas = [number for _, number, _ in row.history]
                panel.step(hours, replicas, where="post", color=colours[row.policy],
                           label=row.policy, linewidth=1.1)  # fmt: skip
        panel.set_title(rows[0].trace, fontsize=9)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.supxlabel("hours")
    figure.supylabel("replicas that are paid for")
    figure.tight_layout()
    figure.savefig(path / "autoscale.png", dpi=70)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 2.6 * lines), squeeze=False
    )
    for panel, rows in zip(panels.flat, by_trace, strict=False):
        serve = [row for row in rows if row.policy.startswith("Serve")]
        for some, style in ((serve, "o-"), ([r for r in rows if r.policy == OURS], "s"),
                            ([r for r in rows if r.policy == FIXED], "x")):  # fmt: skip
            name = "Serve, targets 40 to 100%" if some is serve else some[0].policy
            colour = colours.get(some[0].policy, colours[serves(MIDDLE)])
            panel.plot([r.replica_hours for r in some],
                       [100 * r.violations / r.priority_requests for r in some],
                       style, color=colour, label=name, markersize=5)  # fmt: skip
        panel.set_title(rows[0].trace, fontsize=9)
        panel.set_yscale("symlog", linthresh=0.01)
        panel.set_ylim(bottom=-0.002)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.supxlabel("replica-hours")
    figure.supylabel("priority requests over 1 s to the first token, %")
    figure.tight_layout()
    figure.savefig(path / "autoscale-frontier.png", dpi=70)


def main(
    only: Annotated[str, typer.Option(help="Play traces whose name contains this.")] = "",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench"),
    seeds: Annotated[int, typer.Option(help="Instead: try so many seeds, without plots.")] = 0,
    least: Annotated[int, typer.Option(help="Frontline's min_replicas.")] = 1,
    flex_extra_replicas: Annotated[int, typer.Option(help="Frontline's.")] = 0,
    jobs: Annotated[int, typer.Option(help="How many processes simulate.")] = 1,
    trace: Annotated[str, typer.Option(help="Real traffic: azure, mooncake or servegen.")] = "",
    data: Annotated[Path, typer.Option(help="Folder with the trace's published files.")] = Path(),
    replicas: Annotated[str, typer.Option(help="Fleet sizes of real traffic.")] = "1,20,200",
    starts: Annotated[str, typer.Option(help="Start times of real traffic, in s.")] = "30,120,300",
    hours: Annotated[str, typer.Option(help="ServeGen: only these, by request, and fluid.")] = "",
    cohort: Annotated[int, typer.Option(help="With --hours: so many requests as one.")] = 1,
    only_policies: Annotated[str, typer.Option(help="Policies, instead of all.")] = "",
) -> None:
    """Simulate, and print what each policy costs and what it leads to."""
    if trace:
        if trace not in autoscale_traces.NAMES:
            raise typer.BadParameter("azure, mooncake or servegen", param_hint="--trace")
        sizes, times = [int(n) for n in replicas.split(",")], [float(s) for s in starts.split(",")]
        sampled = [int(hour) for hour in hours.split(",") if hour]
        names = [name for name in only_policies.split(",") if name]
        if sampled:
            if trace != "servegen":
                raise typer.BadParameter("only with --trace servegen", param_hint="--hours")
            hourly = autoscale_hours.cases(data, sizes, times, sampled, cohort)
            print(autoscale_hours.compare(hourly, out, jobs, names))
            return
        chosen_cases = autoscale_traces.cases(trace, data, sizes, times)
        print(autoscale_traces.compare(chosen_cases, out, jobs, names))
        return
    chosen = [replace(trace, seed=seed) for trace in traces() if only in trace.name]
    if not chosen:
        raise typer.BadParameter("no trace has that in its name", param_hint="--only")
    if seeds:
        print(try_seeds(chosen, seeds, least, flex_extra_replicas, jobs))
        return
    runs = [
        (trace, name, least, flex_extra_replicas) for trace in chosen for name in policies(trace)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        played = pool.map(play, *zip(*runs, strict=True))
        rows = list(steps(played, "traces", total=len(runs)))
    by_trace = [[row for row in rows if row.trace == trace.name] for trace in chosen]
    text = f"{table(rows)}\n\n{goals(by_trace)}\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "autoscale.md").write_text(text)
    (out / "autoscale.json").write_text(json.dumps([vars(row) for row in rows]))
    draw(out, by_trace)


if __name__ == "__main__":
    typer.run(main)
