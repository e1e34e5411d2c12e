"""What the overhead benchmark found, for people. Pure, but for writing files."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from scripts.bench.drive import Sample

FLOOR = "engine alone"
FRONTLINE = "Frontline"
UNMEASURED = "Frontline without metrics"
BARE = "bare Serve"
_NONE = math.nan


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether every answer carried its tier and has its record.

    Attributes:
        answers: whole answers that the generators received from Frontline.
        completed: records of answers that came to their end.
        records: all of them; those that the generators cut off at the end of a load too.
        other_tier: records of another tier than the one that was asked for.
        untrue: answers or events without their tier.
    """

    answers: int
    completed: int
    records: int
    other_tier: int
    untrue: int

    @property
    def sound(self) -> bool:
        """Whether nothing is missing."""
        return self.completed >= self.answers and not self.other_tier and not self.untrue


@dataclass(frozen=True, slots=True)
class Row:
    """One load on one gateway: medians over the rounds; ``nan`` where it does not apply.

    Attributes:
        per_s: answers a second; for streams those that ended.
        events_per_s: events a second.
        p50_s: of a unary answer, or of a stream's first byte.
        p99_s: likewise.
        gap_p99_s: between two events of a paced stream.
        added_s: how much longer that is than at the engine itself, in the same round.
        cpu_s: of all that serves requests, by answer, or by event for streams.
        own_cpu_s: of the ingress alone.
        memory_mb: resident.
        busy: the share of a core that all that serves requests used.
        failed: answers that broke off or were errors, in all rounds together.
    """

    gateway: str
    load: str
    per_s: float
    events_per_s: float
    p50_s: float
    p99_s: float
    gap_p99_s: float
    added_s: float
    cpu_s: float
    own_cpu_s: float
    memory_mb: float
    busy: float
    failed: int

    @property
    def merged(self) -> bool:
        """Whether the core was so busy that events came together, so that each cost less."""
        return self.busy >= SATURATED and not math.isnan(self.gap_p99_s)


SATURATED: Final = 0.7
"""From this share of a core on, a gateway's cost of a paced event is marked."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that was promised, and what was measured."""

    what: str
    measured: str
    met: bool | None


def line(sample: Sample) -> str:
    """Return one measurement as it is logged."""
    told = ", ".join(f"{name} {value:.6g}" for name, value in sample.told.items())
    cpu = ", ".join(f"{role} {used:.2f}" for role, used in sample.cpu_s.items() if used >= 0.01)
    return f"{sample.gateway}, {sample.load}: {told}; CPU seconds: {cpu}"


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """Return a row for each load on each gateway, in the order in which they came."""
    together: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        together.setdefault((sample.load, sample.gateway), []).append(sample)
    return [_row(those, together.get((load, FLOOR), [])) for (load, _), those in together.items()]


def _row(samples: Sequence[Sample], floor: Sequence[Sample]) -> Row:
    def middle(value: Callable[[Sample], float]) -> float:
        return median(value(sample) for sample in samples)

    first, told = samples[0], samples[0].told
    unary, paced = "requests" in told, first.load.startswith("paced")
    kind = "" if unary else "first_"
    pairs = zip(samples, floor, strict=False) if paced else ()
    added = [mine.told["gap_p99_s"] - its.told["gap_p99_s"] for mine, its in pairs]
    return Row(
        gateway=first.gateway,
        load=first.load,
        per_s=_NONE if paced else middle(lambda s: s.answers / s.told["seconds"]),
        events_per_s=_NONE if unary else middle(lambda s: s.told["events"] / s.told["seconds"]),
        p50_s=_NONE if paced else middle(lambda s: s.told[f"{kind}p50_s"]),
        p99_s=_NONE if paced else middle(lambda s: s.told[f"{kind}p99_s"]),
        gap_p99_s=middle(lambda s: s.told["gap_p99_s"]) if paced else _NONE,
        added_s=median(added) if added else _NONE,
        cpu_s=middle(lambda s: _spent(s, _serving(s))),
        own_cpu_s=middle(lambda s: _spent(s, ("ingress",))) if "ingress" in first.cpu_s else _NONE,
        memory_mb=middle(lambda s: s.memory_mb),
        busy=middle(lambda s: s.busy),
        failed=sum(int(s.told.get("errors", s.told.get("broken", 0))) for s in samples),
    )


def _serving(sample: Sample) -> tuple[str, ...]:
    own = {
        FRONTLINE: ("ingress", "HAProxy"),
        UNMEASURED: ("ingress", "HAProxy"),
        BARE: ("passthrough", "HAProxy"),
        FLOOR: ("engine",),
    }
    return own.get(sample.gateway, ("gateway",))


def _spent(sample: Sample, roles: Sequence[str]) -> float:
    """Processor seconds of some roles for an answer, or for an event."""
    used = sum(sample.cpu_s.get(role, 0.0) for role in roles)
    count = sample.events if "every_event" in sample.told else sample.answers
    return used / count if count else _NONE


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("load", lambda r: r.load),
    ("gateway", lambda r: r.gateway),
    ("answers/s", lambda r: _number(r.per_s)),
    ("events/s", lambda r: _number(r.events_per_s)),
    ("p50 ms", lambda r: _number(r.p50_s * 1e3, 2)),
    ("p99 ms", lambda r: _number(r.p99_s * 1e3, 2)),
    ("gap p99 ms", lambda r: _number(r.gap_p99_s * 1e3, 1)),
    ("added ms", lambda r: _number(r.added_s * 1e3, 1)),
    ("CPU us", lambda r: _number(r.cpu_s * 1e6, 1) + "*" * r.merged),
    ("ingress us", lambda r: _number(r.own_cpu_s * 1e6, 1)),
    ("core %", lambda r: _number(r.busy * 100)),
    ("MB", lambda r: _number(r.memory_mb)),
    ("failed", lambda r: str(r.failed)),
)


def markdown(rows: Sequence[Row], goals: Sequence[Goal]) -> str:
    """Return the table and the verdicts as they stand in the documentation."""
    lines = [[name for name, _ in _COLUMNS], ["---", "---", *["--:"] * (len(_COLUMNS) - 2)]]
    lines += [[cell(row) for _, cell in _COLUMNS] for row in rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    told = [f"| {goal.what} | {goal.measured} | {verdicts[goal.met]} |" for goal in goals]
    return "\n".join([table, "", "| goal | measured | |", "| --- | --- | --- |", *told, ""])


def _number(value: float, digits: int = 0) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def goals_of(rows: Sequence[Row], memory: Sequence[tuple[int, float]]) -> list[Goal]:
    """Check what is promised against the rows."""
    by = {(row.gateway, row.load): row for row in rows}
    goals = [
        _ratio(by, "unary 16", BARE, 0.85),
        _ratio(by, "unary 16", "litellm", 10),
        _ratio(by, "unary 16", "portkey", 1.5),
        _ratio(by, "unary 16", "smg", 1),
        _ratio(by, "streams 16", "smg", 1.2),
        _most(by, "paced 256 at 50/s", lambda r: r.added_s, 1e3, 5, "added inter-token p99, ms"),
        _most(by, "unary 16", lambda r: r.own_cpu_s, 1e3, 0.42, "ingress CPU of a request, ms"),
        _most(by, "streams 16", lambda r: r.own_cpu_s, 1e6, 5, "ingress CPU of an event, us"),
        _most(by, "paced 256", lambda r: r.own_cpu_s, 1e6, 20, "ingress CPU of an event, us"),
        _cost(by, "paced 256", "smg", 1.6),
        _cost(by, "paced 256", BARE, 0.8),
        _first_byte(by),
        _long_prompt(by),
    ]
    if len(memory) > 2:
        goals.append(_flat(memory))
    return goals


_Rows = Mapping[tuple[str, str], Row]


def _ratio(by: _Rows, load: str, other: str, least: float) -> Goal:
    what = f"{load}: at least {least:g} x {other}"
    if (rates := _both(by, load, other, lambda row: row.per_s)) is None:
        return Goal(what, "", None)
    mine, theirs = rates
    ratio = mine / theirs
    return Goal(what, f"{ratio:.2f} x ({mine:,.0f} and {theirs:,.0f}/s)", ratio >= least)


def _cost(by: _Rows, load: str, other: str, most: float) -> Goal:
    what = f"{load}: CPU of an event: at most {most:g} x {other}"
    if (costs := _both(by, load, other, lambda row: row.cpu_s * 1e6)) is None:
        return Goal(what, "", None)
    mine, theirs = costs
    ratio = mine / theirs
    return Goal(what, f"{ratio:.2f} x ({mine:.1f} and {theirs:.1f} us)", ratio <= most)


def _both(
    by: _Rows, load: str, other: str, value: Callable[[Row], float]
) -> tuple[float, float] | None:
    """Return a figure of ours and of another gateway, if both were measured."""
    mine, theirs = by.get((FRONTLINE, load)), by.get((other, load))
    if mine is None or theirs is None or not value(theirs):
        return None
    return value(mine), value(theirs)


def _most(
    by: _Rows, load: str, value: Callable[[Row], float], unit: float, most: float, what: str
) -> Goal:
    what, mine = f"{load}: {what}: at most {most:g}", by.get((FRONTLINE, load))
    if mine is None or math.isnan(value(mine)):
        return Goal(what, "", None)
    measured = value(mine) * unit
    return Goal(what, f"{measured:.2f}", measured <= most)


def _first_byte(by: _Rows) -> Goal:
    what = "streams 1: first byte, p50: at most 0.8 ms over bare Serve"
    mine, bare = by.get((FRONTLINE, "streams 1")), by.get((BARE, "streams 1"))
    if mine is None or bare is None:
        return Goal(what, "", None)
    added = (mine.p50_s - bare.p50_s) * 1e3
    return Goal(
        what, f"{added:+.2f} ms ({mine.p50_s * 1e3:.2f}, {bare.p50_s * 1e3:.2f})", added <= 0.8
    )


def _long_prompt(by: _Rows) -> Goal:
    what = "1 MB prompt: ingress CPU of a request, ms: at most 10"
    mine = by.get((FRONTLINE, "1 MB 1"))
    if mine is None:
        return Goal(what, "", None)
    return Goal(what, f"{mine.own_cpu_s * 1e3:.2f}", mine.own_cpu_s <= 0.01)


def _flat(memory: Sequence[tuple[int, float]]) -> Goal:
    """The slope over the second half, by least squares: caches fill in the first."""
    half = memory[len(memory) // 2 :]
    mean_x = sum(x for x, _ in half) / len(half)
    mean_y = sum(y for _, y in half) / len(half)
    spread = sum((x - mean_x) ** 2 for x, _ in half)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in half) / spread if spread else _NONE
    total = memory[-1][0]
    measured = f"{slope * 1e6:+.1f} bytes a request ({memory[0][1]:.0f} to {memory[-1][1]:.0f} MB)"
    return Goal(f"memory flat over {total:,} requests", measured, abs(slope) * 1e6 <= 10)


def write(
    path: Path, machine: dict[str, Any], options: argparse.Namespace, rows: Sequence[Row],
    goals: Sequence[Goal], checked: Checked, memory: Sequence[tuple[int, float]],
    samples: Sequence[Sample],
) -> None:  # fmt: skip
    """Write everything as JSON, every measurement included."""
    results = {
        "machine": machine,
        "options": {name: str(value) for name, value in vars(options).items()},
        "checked": asdict(checked),
        "goals": [asdict(goal) for goal in goals],
        "rows": [_finite(asdict(row)) for row in rows],
        "memory_mb_by_requests": memory,
        "samples": [{**asdict(s), "told": dict(s.told), "cpu_s": dict(s.cpu_s)} for s in samples],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no ``nan``."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


_PANELS: tuple[tuple[str, str, str, Callable[[Row], float]], ...] = (
    ("unary 16", "requests/s, 16 connections", "linear", lambda r: r.per_s),
    ("streams 16", "streams/s, 16 connections, unpaced", "linear", lambda r: r.per_s),
    ("paced 512", "p99 between tokens, 512 streams, ms", "log", lambda r: r.gap_p99_s * 1e3),
)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the gateways beside each other, without the engine where it would dwarf them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_PANELS), figsize=(13, 3.4))
    for panel, (load, title, scale, value) in zip(panels, _PANELS, strict=True):
        shown = [r for r in rows if r.load == load and not math.isnan(value(r)) and value(r) > 0]
        shown = [r for r in shown if scale == "log" or r.gateway != FLOOR]
        colours = ["#d1495b" if r.gateway == FRONTLINE else "#30638e" for r in shown]
        bars = panel.barh([r.gateway for r in shown], [value(r) for r in shown], color=colours)
        panel.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
        # A panel without bars has no logarithm.
        panel.set(title=title, xscale=scale if shown else "linear")
        panel.margins(x=0.18)
        panel.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
