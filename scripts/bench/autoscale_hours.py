"""Hours of ServeGen's fourteen days by request and as a fluid; started by ``autoscale.py --hours``.

Fourteen days are over a billion requests, so that only the fluid can play them (``fluid``). How far
it can be believed shows on single hours, which both it and ``batching`` play, with the same fleet
at the start. The arrivals of the two are drawn apart, as those of the fourteen days are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from scripts.bench.autoscale_traces import HPA, IDEAL, OURS, OURS_ROOM, SERVE, Case, Row, play
from scripts.bench.progress import steps
from scripts.bench.trace_files import WINDOW_S

POLICIES = (SERVE, HPA, OURS, OURS_ROOM, IDEAL)
_WINDOWS = round(3600 / WINDOW_S)


def cases(
    data: Path,
    replicas: Sequence[int],
    starts: Sequence[float],
    hours: Sequence[int],
    cohort: int = 1,
) -> list[Case]:
    """Return each hour twice, by request and as a fluid, for every fleet and start time.

    Args:
        data: the folder of traces.
        replicas: how many full replicas the mean of the fourteen days keeps busy.
        starts: how long a replica takes to start, in seconds.
        hours: from the trace's start, counted from 0.
        cohort: how many requests are followed as one.
    """
    return [
        Case(kind, data, n, start, (hour * _WINDOWS, (hour + 1) * _WINDOWS), cohort=cohort)
        for n in replicas
        for start in starts
        for hour in hours
        for kind in ("servegen-hour", "servegen")
    ]


def compare(chosen: Sequence[Case], out: Path, jobs: int, only: Sequence[str] = ()) -> str:
    """Play all cases, write every figure as JSON into ``out``, and return the table."""
    names = [name for name in POLICIES if not only or name in only]
    with ProcessPoolExecutor(jobs) as pool:
        played = pool.map(play, chosen, [names] * len(chosen))
        rows = list(steps(played, "hours", total=len(chosen)))
    out.mkdir(parents=True, exist_ok=True)
    figures = [
        {"hour": case.windows[0] // _WINDOWS, "cohort": case.cohort} | asdict(row)
        for case, some in zip(chosen, rows, strict=True)
        if case.windows is not None
        for row in some
    ]
    (out / "autoscale-hours.json").write_text(json.dumps(figures))
    text = table([row for some in rows for row in some])
    (out / "autoscale-hours.md").write_text(text + "\n")
    return text


def table(rows: Sequence[Row]) -> str:
    """Return, by fleet and policy, what all hours came to by request and as a fluid.

    Replica-hours are those of all hours together. The rest is the mean of the hours, and in
    brackets the worst of them. *Fluid off by* is by how much its replica-hours of an hour differ.
    """
    lines = [
        "| fleet | start | policy | replica-hours | fluid off by "
        "| priority on time | default wait p95 | default shed | flex in 10 min |",
        "| --: | --: | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for single, fluid in _pairs(rows):
        first = single[0]
        ratios = [b.replica_hours / a.replica_hours - 1 for a, b in zip(single, fluid, strict=True)]
        both = (single, fluid)
        hours = ", ".join(f"{sum(row.replica_hours for row in some):.1f}" for some in both)
        on_time = ", ".join(_share([r.on_time for r in some], min) for some in both)
        waits = ", ".join(
            f"{np.mean([r.default_p95_s for r in some]):.1f} s "
            f"({max(r.default_p95_s for r in some):.0f})"
            for some in both
        )
        shed = ", ".join(_share([r.default_shed for r in some], max) for some in both)
        flex = ", ".join(f"{100 * np.mean([r.flex_done for r in some]):.0f} %" for some in both)
        lines.append(
            f"| {first.replicas} | {first.start_s:.0f} s | {first.policy} | {hours} | "
            f"{100 * min(ratios):+.0f} to {100 * max(ratios):+.0f} % | "
            f"{on_time} | {waits} | {shed} | {flex} |"
        )
    return "\n".join(lines)


def _share(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    return f"{100 * np.mean(values):.2f} % ({100 * worst(values):.2f})"


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield the rows by request and those of the fluid, in the hours' order."""
    for key in dict.fromkeys((row.replicas, row.start_s, row.policy) for row in rows):
        own = [row for row in rows if (row.replicas, row.start_s, row.policy) == key]
        single = [row for row in own if row.trace == "servegen-hour"]
        yield single, [row for row in own if row.trace == "servegen"]
