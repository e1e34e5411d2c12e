"""What flex costs the others that fills whatever they leave idle, and how much of it it uses.

    flex alone │ default and priority at half load │ the same with flex │ the same │ without flex

Without flex, default and priority have as many clients as half the slots. With it, flex has twice
as many clients as slots.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.bench.burst import Contender
from scripts.bench.burst_summary import tokens_per_s
from scripts.bench.effort import Processes
from scripts.bench.load import Answer, Load, Workload
from scripts.bench.progress import steps
from scripts.bench.report import finite, milliseconds
from scripts.bench.summary import percentile
from scripts.bench.trial import Say, Window, watched

FLEX, WITHOUT, WITH = "flex alone", "without flex", "with flex"
ORDER = (FLEX, WITHOUT, WITH, WITH, WITHOUT)
_COLUMNS = ("endpoint", "tier", "phase", "n", "TTFT p50", "TTFT p99", "tokens/s", "share of idle")


@dataclass(slots=True)
class FillTrial:
    """What was measured at one endpoint: its answers, and the windows of each phase."""

    endpoint: str
    answers: list[Answer]
    unfinished: list[Answer] = field(default_factory=list)
    windows: dict[str, list[Window]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FillRow:
    """One tier in one phase. Times in seconds; ``nan`` where nothing was measured.

    Attributes:
        count: how many first tokens came, of which the percentiles are.
        used: flex's tokens by those that default and priority leave idle; ``None`` for others.
    """

    endpoint: str
    tier: str
    phase: str
    count: int
    ttft_p50: float
    ttft_p99: float
    tokens_per_s: float
    used: float | None = None


def clients_of(phase: str, slots: int) -> dict[str, int]:
    """Return how many clients of each tier there are in a phase."""
    priority = max(1, slots // 8)
    others = {"priority": priority, "default": max(1, slots // 2 - priority)}
    flex = {"flex": 2 * slots}
    return {FLEX: flex, WITHOUT: others, WITH: others | flex}[phase]


async def run_fill(
    contenders: Sequence[Contender],
    workload: Workload,
    slots: int,
    alone_s: float,
    say: Say,
    processes: Processes = dict,
) -> list[FillTrial]:
    """Measure every endpoint in turn, each phase for ``alone_s`` seconds after settling."""
    trials = []
    phases = steps(len(contenders) * ORDER, "fill")
    for contender in contenders:
        load = Load(contender.endpoint, workload, most=50_000)
        trial = FillTrial(contender.endpoint.name, load.answers)
        try:
            for phase in islice(phases, len(ORDER)):
                say(f"{trial.endpoint}: {phase}")
                window = await _phase(load, trial, clients_of(phase, slots), alone_s, processes)
                trial.windows.setdefault(phase, []).append(window)
        finally:
            await load.close()
        trials.append(trial)
    return trials


async def _phase(
    load: Load, trial: FillTrial, clients: Mapping[str, int], alone_s: float, processes: Processes
) -> Window:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(load.ask_for_ever(tier, f"{trial.endpoint} {tier}", number / 20))
            for tier, count in clients.items()
            for number in range(count)
        ]
        # Half as long again to settle, so that no phase begins with all streams in step.
        await asyncio.sleep(alone_s / 2)
        window, _ = await watched(asyncio.sleep(alone_s), processes)
        for answer in load.open:
            answer.ended, answer.error = time.monotonic(), "aborted"
        trial.unfinished.extend(load.open)
        for task in tasks:
            task.cancel()
    return window


def rows_of(trial: FillTrial) -> list[FillRow]:
    """Return the rows of one endpoint."""
    others = [
        _row(trial, tier, phase) for tier in ("priority", "default") for phase in (WITHOUT, WITH)
    ]
    alone, filling = _row(trial, "flex", FLEX), _row(trial, "flex", WITH)
    busy = sum(row.tokens_per_s for row in others if row.phase == WITHOUT)
    used = filling.tokens_per_s / (alone.tokens_per_s - busy)
    return [*others, alone, FillRow(**(asdict(filling) | {"used": used}))]


def _row(trial: FillTrial, tier: str, phase: str) -> FillRow:
    windows = trial.windows[phase]
    mine = [answer for answer in (*trial.answers, *trial.unfinished) if answer.tier == tier]
    seen = [a.ttft for a in mine if a.first and any(window.has(a.first) for window in windows)]
    return FillRow(
        trial.endpoint, tier, phase, len(seen), percentile(seen, 0.5), percentile(seen, 0.99),
        tokens_per_s(mine, windows),
    )  # fmt: skip


def markdown(rows: Sequence[FillRow]) -> str:
    """Return the table as it stands in the documentation."""
    lines = [_COLUMNS, ["---"] * 3 + ["--:"] * 5]
    return "\n".join(f"| {' | '.join(line)} |" for line in (*lines, *map(_cells, rows)))


def _cells(row: FillRow) -> list[str]:
    return [
        row.endpoint, row.tier, row.phase, str(row.count), milliseconds(row.ttft_p50),
        milliseconds(row.ttft_p99), f"{row.tokens_per_s:.1f}",
        "" if row.used is None else f"{row.used:.1%}",
    ]  # fmt: skip


def write(path: Path, about: dict[str, Any], rows: Sequence[FillRow]) -> None:
    """Write the rows as JSON, and as a table beside it."""
    results = {**about, "rows": [finite(asdict(row)) for row in rows]}
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(rows) + "\n")
