"""The modes ``burst`` and ``fill`` of scripts/bench/contention.py: options, run, results."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from scripts.bench import burst_report, burst_summary, fill, report
from scripts.bench.burst import BurstPlan, BurstTrial, Contender, run_bursts
from scripts.bench.load import Workload
from scripts.bench.summary import Goal
from scripts.bench.targets import Contenders

Start = AbstractContextManager[Contenders]
"""Starts what is measured, and ends it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both modes."""
    burst = parser.add_argument_group("with --mode burst")
    burst.add_argument("--burst-size", type=int, help="requests at once; not set: the slots")
    burst.add_argument("--burst-tokens", type=int, default=16, help="length of their answers")
    burst.add_argument("--idle-bursts", type=int, help="on the idle engine, each turn")
    burst.add_argument("--bursts", type=int, help="on the saturated engine, each turn")
    burst.add_argument("--every-s", type=float, help="from one of those to the next, at least")
    burst.add_argument("--flex-clients", type=int, default=0, help="flex clients at once")
    burst.add_argument("--rounds", type=int, default=1, help="turns of each endpoint")
    burst.add_argument("--only", nargs="+", metavar="NAME", help="only these endpoints")


def plan_of(options: argparse.Namespace, slots: int) -> BurstPlan:
    """Return how much of everything was asked for, with bursts."""
    return BurstPlan(
        clients=options.clients,
        flex_clients=options.flex_clients,
        size=options.burst_size or slots,
        slots=slots,
        tokens=options.burst_tokens,
        idle_bursts=options.idle_bursts,
        bursts=options.bursts,
        every_s=options.every_s,
        alone_s=options.alone_s,
        rounds=options.rounds,
        most=options.max_requests,
    )


def run_burst(
    options: argparse.Namespace, start: Start, workload: Workload, console: Console
) -> bool:
    """Measure bursts, show and write the results; return whether every goal is met."""
    with start as contenders:
        plan = plan_of(options, contenders.slots)
        chosen = _chosen(contenders, options.only)
        about: dict[str, Any] = {
            "machine": report.machine(),
            "plan": asdict(plan),
            "workload": asdict(workload),
            "engine": contenders.engine,
        }
        keep = partial(_write, options, about, contenders.simulated)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            trials = runner.run(
                run_bursts(chosen, workload, plan, console.log, contenders.processes, keep)
            )
    return _tell(console, options, about, trials, contenders.simulated)


def _chosen(contenders: Contenders, only: Sequence[str] | None) -> list[Contender]:
    return [one for one in contenders.each if only is None or one.endpoint.name in only]


def run_fill(
    options: argparse.Namespace, start: Start, workload: Workload, console: Console
) -> None:
    """Measure what flex costs that fills what is idle; show and write the results."""
    names = options.only or (options.target and [burst_summary.HEADROOM, burst_summary.PREEMPTION])
    with start as contenders, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        slots, seconds = options.burst_size or contenders.slots, options.alone_s
        chosen = _chosen(contenders, names)
        trials = runner.run(
            fill.run_fill(chosen, workload, slots, seconds, console.log, contenders.processes)
        )
    rows = [row for trial in trials for row in fill.rows_of(trial)]
    about = {
        "machine": report.machine(),
        "engine": contenders.engine,
        "workload": asdict(workload),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"fill-{options.target or 'url'}.json"
    fill.write(path, about, rows)
    console.print(fill.markdown(rows), soft_wrap=True)
    console.print(f"{path} (and .md)")


def _tell(
    console: Console, options: argparse.Namespace, about: dict[str, Any],
    trials: list[BurstTrial], simulated: bool,
) -> bool:  # fmt: skip
    """Show and write the results of bursts; return whether every goal is met."""
    rows, goals, path = _write(options, about, simulated, trials)
    console.print(burst_report.table(rows))
    burst_report.show(console, trials)
    report.show_goals(console, goals)
    size = about["plan"]["size"]
    title = (
        f"{size} priority requests at once, {options.clients} default clients; {about['engine']}"
    )
    burst_report.draw(path.with_suffix(".svg"), title, trials)
    console.print(f"{path} (and .md, .svg)")
    return all(goal.met for goal in goals)


def _write(
    options: argparse.Namespace, about: dict[str, Any], simulated: bool, trials: list[BurstTrial],
) -> tuple[list[burst_summary.BurstRow], list[Goal], Path]:  # fmt: skip
    rows = [burst_summary.row_of(trial) for trial in trials]
    goals = burst_summary.goals_of(rows, simulated=simulated)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"burst-{options.target or 'url'}.json"
    burst_report.write(path, about, trials, rows, goals)
    tables = (burst_report.markdown(rows), burst_report.goals_markdown(goals))
    path.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    return rows, goals, path
