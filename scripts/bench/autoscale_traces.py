"""Autoscaling policies side by side on real traffic; started by ``autoscale.py --trace``.

Every policy runs on the same engines, queue and arrivals (``batching``, ``traffic``). Figures:

- replica-hours, and their cost per million tokens of requests served to their end;
- priority: share of requests whose first token is on time (within 2 s, or within 1.5 times what an
  idle engine takes for that prompt, where that is longer), the p99, and the share of minutes in
  which 99 % were on time;
- default: p95 of the wait in the queue, and the share shed;
- flex: the share that ended within ten minutes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from app.config.queue import QueueSettings
from app.config.scaling import ScalingSettings
from scripts.bench.batching import Cluster, Served, Simulation
from scripts.bench.engine_model import PUBLISHED, EngineModel, fit
from scripts.bench.fleet import Policy
from scripts.bench.fluid import FluidSimulation
from scripts.bench.policies import PriorityAware, ServesOwn
from scripts.bench.progress import steps
from scripts.bench.rivals import Forecaster, Hpa, Ideal
from scripts.bench.trace_files import (
    Client,
    Floats,
    Requests,
    read_azure,
    read_mooncake,
    read_servegen,
)
from scripts.bench.traffic import Traffic, draw_fluid, draw_requests, multiply

SLO_S, IDLE_FACTOR, FLEX_S = 2.0, 1.5, 600.0
START_S = (30.0, 120.0, 300.0)
REPLICAS = (1, 20, 200)
SERVE_TARGET = 0.7
"""Serve's ``target_ongoing_requests`` as a share of the slots."""
GPU_HOUR_USD, GPUS = 2.5, 4
"""A stated price, only to compare: four H100 to a replica."""
FLUID_TICK_S = 15.0
FLUID_CONTROL_S = 60.0
MOONCAKE_SLOTS = 48
"""Its contexts of 12,000 tokens do not fit 64 times into four GPUs' cache of 660,000 tokens."""
SERVE, HPA, FORECAST, OURS, OURS_FLEX, OURS_ROOM, IDEAL = (
    "Serve", "KEDA", "Holt-Winters", "Frontline", "Frontline, flex bought",
    "Frontline, headroom", "ideal",
)  # fmt: skip
HEADROOM = 0.25
"""The share of slots that only priority may use, in ``OURS_ROOM``."""
NAMES = ("azure", "mooncake", "servegen")


@dataclass(frozen=True)
class Case:
    """What is played: one trace on a fleet of one size, with one start time.

    Attributes:
        trace: azure-code, azure-conv, mooncake, servegen (fluid) or servegen-hour (requests).
        data: the folder of traces.
        replicas: how many full replicas the mean keeps busy.
        start_s: how long a replica takes to start.
        windows: first window of 600 s, and the one after the last; of ServeGen.
        seed: of everything random.
        cohort: how many of servegen-hour's requests are followed as one.
    """

    trace: str
    data: Path
    replicas: int
    start_s: float
    windows: tuple[int, int] | None = None
    seed: int = 1
    cohort: int = 1


@dataclass(frozen=True)
class Row:
    """One policy on one case, or on a part of its time; shares are from 0 to 1."""

    trace: str
    replicas: int
    start_s: float
    policy: str
    part: str
    replica_hours: float
    usd_per_million: float
    on_time: float
    minutes_on_time: float
    ttft_p99_s: float
    default_p95_s: float
    default_shed: float
    flex_done: float
    preempted: float
    cpu_s: float
    history: list[tuple[float, float]]


def engine_for(trace: str) -> EngineModel:
    """Return the engine that a trace runs on."""
    model = fit(PUBLISHED)
    return replace(model, slots=MOONCAKE_SLOTS) if trace == "mooncake" else model


def traffic_for(case: Case) -> Traffic:
    """Return the arrivals of a case."""
    engine = engine_for(case.trace)
    if not case.trace.startswith("servegen"):
        return multiply(
            case.trace, _requests(case.data, case.trace), engine, case.replicas, case.seed
        )
    clients = _clients(case.data)
    first, last = case.windows or (0, len(clients[0].rate))
    if case.trace == "servegen-hour":
        return draw_requests(clients, engine, case.replicas, first, last - first, case.seed,
                             case.cohort)  # fmt: skip
    return draw_fluid(clients, engine, case.replicas, FLUID_TICK_S, first, last, case.seed)


@cache
def _requests(data: Path, trace: str) -> Requests:
    if trace == "mooncake":
        return read_mooncake(_found(data, "conversation_trace.jsonl"))
    return read_azure(_found(data, f"AzureLLMInferenceTrace_{trace.removeprefix('azure-')}.csv"))


@cache
def _clients(data: Path) -> list[Client]:
    return read_servegen(_found(data, "chunk-0-trace.csv").parent)


def _found(data: Path, name: str) -> Path:
    path = next(iter(sorted(data.rglob(name))), None)
    if path is None:
        raise FileNotFoundError(f"{data}: no {name} in it")
    return path


def policies() -> list[str]:
    """Return the policies that can run here."""
    known = [SERVE, HPA, FORECAST, OURS, OURS_FLEX, OURS_ROOM, IDEAL]
    if find_spec("statsmodels") is None:
        print("no statsmodels (the `bench` dependency group): the forecaster is left out",
              file=sys.stderr)  # fmt: skip
        known.remove(FORECAST)
    return known


def play(case: Case, names: Sequence[str], split: bool = False) -> list[Row]:
    """Play a case to some policies."""
    traffic, engine = traffic_for(case), engine_for(case.trace)
    # Asked seldom enough to simulate; production asks every second.
    control_s = FLUID_CONTROL_S if case.trace == "servegen" else 1.0 if case.replicas == 1 else 5.0
    most = max(4, 4 * case.replicas)
    rows = []
    for name in names:
        policy = _policy(name, case, traffic, engine, most, control_s)
        first = traffic.work[traffic.columns[:, 0] < 300.0].sum() / 300.0
        initial = min(most, max(1, math.ceil(first / SERVE_TARGET)))
        cluster = Cluster(engine, case.start_s, initial, most, control_s)
        began = time.process_time()
        queue = QueueSettings(headroom=HEADROOM) if name == OURS_ROOM else QueueSettings()
        served = _run(cluster, policy, traffic, queue, fluid=case.trace == "servegen")
        cpu_s = time.process_time() - began
        end = traffic.seconds
        parts = {"all": (0.0, end)}
        if split:
            parts |= {"days 1-7": (0.0, end / 2), "days 8-14": (end / 2, end)}
        for part, (start, until) in parts.items():
            rows.append(_row(case, name, part, served, traffic, start, until, control_s, cpu_s))
    return rows


def _run(cluster: Cluster, policy: Policy, traffic: Traffic, queue: QueueSettings, *,
         fluid: bool) -> Served:  # fmt: skip
    if fluid:
        return FluidSimulation(cluster, policy, queue).run(traffic, FLUID_TICK_S)
    simulation = Simulation(cluster, policy, queue)
    return simulation.run(traffic.arrivals(), traffic.seconds)


def _policy(name: str, case: Case, traffic: Traffic, engine: EngineModel, most: int,
            control_s: float) -> Policy:  # fmt: skip
    made: dict[str, Callable[[], Policy]] = {
        SERVE: lambda: ServesOwn(SERVE_TARGET * engine.slots, most),
        HPA: lambda: Hpa(engine.slots),
        FORECAST: lambda: Forecaster(
            engine, case.start_s, float(traffic.work.sum() / traffic.columns[:, 5].sum())
        ),
        OURS: lambda: PriorityAware(ScalingSettings(), most),
        OURS_ROOM: lambda: PriorityAware(ScalingSettings(), most),
        OURS_FLEX: lambda: PriorityAware(ScalingSettings(flex_extra_replicas=most), most),
        IDEAL: lambda: Ideal(traffic, engine, case.start_s, most, control_s),
    }
    return made[name]()


def _row(case: Case, name: str, part: str, served: Served, traffic: Traffic, start: float,
         end: float, control_s: float, cpu_s: float) -> Row:  # fmt: skip
    history = np.array(served.history)
    own = history[(history[:, 0] > start) & (history[:, 0] <= end)]
    hours = float(own[:, 1].mean()) * (end - start) / 3600
    first = _part(served.first[0], start, end)
    at, ttft, idle, weight = first.T
    # In a fluid a cohort waits for the rest of its tick at least.
    late = ttft > np.maximum(SLO_S, IDLE_FACTOR * idle)
    minutes = (at / 60).astype(int)
    total = np.bincount(minutes, weight)
    bad = np.bincount(minutes, weight * late, minlength=len(total))
    some = total > 0
    waits = _part(served.waits[1], start, end)
    default = _part(served.ended[1], start, end)
    flex = _part(served.ended[2], start, end)
    shed = np.isinf(default[:, 1])
    tokens = served.tokens * float(
        traffic.work[(traffic.columns[:, 0] >= start) & (traffic.columns[:, 0] < end)].sum()
        / traffic.work.sum()
    )  # fmt: skip
    step = max(1, len(history) // 500)
    return Row(
        trace=case.trace,
        replicas=case.replicas,
        start_s=case.start_s,
        policy=name,
        part=part,
        replica_hours=hours,
        usd_per_million=hours * GPUS * GPU_HOUR_USD / max(tokens, 1.0) * 1e6,
        on_time=1 - float((weight * late).sum() / weight.sum()),
        minutes_on_time=float(np.mean(bad[some] <= 0.01 * total[some])),
        ttft_p99_s=_quantile(ttft, weight, 0.99),
        default_p95_s=_quantile(waits[:, 1], waits[:, 2], 0.95),
        default_shed=float(default[shed, 2].sum() / default[:, 2].sum()),
        flex_done=float(flex[flex[:, 1] <= FLEX_S, 2].sum() / flex[:, 2].sum()),
        preempted=served.preempted,
        cpu_s=cpu_s,
        history=[(float(now), float(paid)) for now, paid, _ in history[::step]],
    )


def _part(rows: Sequence[tuple[float, ...]], start: float, end: float) -> Floats:
    array = np.array(rows)
    return array[(array[:, 0] >= start) & (array[:, 0] < end)]


def _quantile(
    values: Floats,
    weights: Floats,
    share: float,
) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(
        values[order][min(len(values) - 1, int(np.searchsorted(total, share * total[-1])))]
    )


def table(rows: Sequence[Row]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| trace | replicas | start | policy | replica-hours | of the ideal | USD per million "
        "tokens | priority on time | minutes on time | TTFT p99 | default wait p95 | default shed "
        "| flex in 10 min |",
        "| --- | --: | --: | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for group in _groups(rows):
        best = next((row.replica_hours for row in group if row.policy == IDEAL), math.nan)
        for index, row in enumerate(group):
            head = f"{row.trace} | {row.replicas} | {row.start_s:.0f} s" if index == 0 else " | | "
            lines.append(
                f"| {head} | {row.policy} | {row.replica_hours:.1f} | "
                f"{row.replica_hours / best:.0%} | {row.usd_per_million:.3f} | {row.on_time:.2%} | "
                f"{row.minutes_on_time:.1%} | {row.ttft_p99_s:.2f} s | {row.default_p95_s:.1f} s | "
                f"{row.default_shed:.2%} | {row.flex_done:.0%} |"
            )
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> str:
    """Return the goals of each case: what was asked, and whether Frontline met it."""
    lines = [
        "| trace | replicas | start | better rival | hours to save | saved | late no more | "
        "shed no more | of the ideal | met |",
        "| --- | --: | --: | --- | --: | --: | --- | --- | --: | --- |",
    ]
    for group in _groups(rows):
        named = {row.policy: row for row in group}
        ours, ideal = named[OURS], named[IDEAL]
        rival = min((named[SERVE], named[HPA]), key=_rank)
        gap = 1 - ideal.replica_hours / rival.replica_hours
        asked = max(0.0, min(0.25, gap / 2))
        saved = 1 - ours.replica_hours / rival.replica_hours
        late, shed = no_worse(ours, rival)
        near = ours.replica_hours / ideal.replica_hours
        within = ours.replicas == 1 or near <= 1.15
        met = saved >= asked and late and shed and within
        lines.append(
            f"| {ours.trace} | {ours.replicas} | {ours.start_s:.0f} s | {rival.policy} | "
            f"{asked:.0%} | {saved:.0%} | {'yes' if late else '**no**'} | "
            f"{'yes' if shed else '**no**'} | {near:.0%} | {'met' if met else '**missed**'} |"
        )
    return "\n".join(lines)


def no_worse(ours: Row, other: Row) -> tuple[bool, bool]:
    """Return whether we have no more late priority requests, and no more default sheds.

    A ten-thousandth of the requests is the resolution: less is chance.
    """
    return ours.on_time >= other.on_time - 1e-4, ours.default_shed <= other.default_shed + 1e-4


def _rank(row: Row) -> tuple[bool, float]:
    """Order rivals: those that serve default and priority first, then by cost."""
    return row.default_shed > 0.001 or row.on_time < 0.999, row.replica_hours


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    keys = dict.fromkeys((row.trace, row.replicas, row.start_s) for row in rows)
    for key in keys:
        yield [row for row in rows if (row.trace, row.replicas, row.start_s) == key]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Plot replicas over time for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(_groups(rows))
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 2.6 * lines), squeeze=False
    )
    for panel, group in zip(panels.flat, groups, strict=False):
        for row in group:
            if row.policy not in (OURS_FLEX, OURS_ROOM):
                times, paid = np.array(row.history).T
                panel.step(times / 3600, paid, where="post", label=row.policy, linewidth=0.8)
        panel.set_title(f"{group[0].trace}, {group[0].replicas}, start {group[0].start_s:.0f} s",
                        fontsize=9)  # fmt: skip
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("hours")
    figure.supylabel("replicas paid for")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def cases(trace: str, data: Path, replicas: Sequence[int], starts: Sequence[float]) -> list[Case]:
    """Return the cases of a trace: every fleet size with every start time."""
    names = {
        "azure": ("azure-code", "azure-conv"),
        "mooncake": ("mooncake",),
        "servegen": ("servegen",),
    }
    return [
        Case(name, data, n, start) for name in names[trace] for n in replicas for start in starts
    ]


def compare(chosen: Sequence[Case], out: Path, jobs: int, only: Sequence[str] = ()) -> str:
    """Play all cases, write JSON, Markdown and plots into ``out``, and return the tables."""
    names = [name for name in policies() if not only or name in only]
    runs = [(case, [name], case.trace == "servegen")
            for case in chosen for name in names]  # fmt: skip
    with ProcessPoolExecutor(jobs) as pool:
        played = pool.map(play, *zip(*runs, strict=True))
        rows = [row for some in steps(played, "fleets", total=len(runs)) for row in some]
    whole = [row for row in rows if row.part == "all"]
    text = table(whole)
    if {SERVE, HPA, OURS, IDEAL} <= set(names):
        text += f"\n\n{goals(whole)}"
        for part in ("days 1-7", "days 8-14"):
            if some := [row for row in rows if row.part == part]:
                text += f"\n\n{part}:\n\n{goals(some)}"
    out.mkdir(parents=True, exist_ok=True)
    stem = "autoscale-" + chosen[0].trace.split("-")[0]
    (out / f"{stem}.md").write_text(text + "\n")
    (out / f"{stem}.json").write_text(json.dumps([asdict(row) for row in rows]))
    draw(out / f"{stem}.svg", whole)
    return text
